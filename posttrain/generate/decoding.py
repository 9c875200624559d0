"""Continue token sequences with a transformers model.

In batches, with its key-value cache, up to a stop token.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.generate.sampling import Sampling
from posttrain.models.families import learned_positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class RepetitionPenalty(LogitsProcessor):
    """Transformers' penalty on the tokens that occur in a row, without those that pad it on its left.

    Args:
        penalty: above 1 makes tokens that occur already less likely.
        padding: how many tokens pad each row.
    """

    def __init__(self, penalty: float, padding: Sequence[int]) -> None:
        self.of_row = RepetitionPenaltyLogitsProcessor(penalty)
        self.padding = padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocabulary] after the penalty on the tokens in input_ids [batch, length]."""
        rows = []
        for row, skipped in enumerate(self.padding):
            rows.append(self.of_row(input_ids[row : row + 1, skipped:], scores[row : row + 1]))
        return torch.cat(rows)


class CheckedLogits(LogitsProcessor):
    """Refuses logits of which no token can be chosen, where an answer would be token 0 again and again."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocabulary] as they are.

        Raises:
            UserError: one of them is NaN or infinite; minus infinity only rules a token out.
        """
        if not (scores < torch.inf).all():  # nor is NaN
            raise UserError(
                "the model's logits are NaN or infinite, so no token can be chosen: its weights are damaged, or too "
                "large for the data type that it is computed in"
            )
        return scores


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that end an answer.

    They are the tokenizer's, the generation config's, and those that the chat template ends a turn
    with: a base model trained on chats ends its turns with the template's token, which its own
    configuration doesn't know.
    """
    stop = turn_ends(tokenizer)
    stop.add(tokenizer.eos_token_id)
    configured = model.generation_config.eos_token_id
    stop.update(configured if isinstance(configured, list) else [configured])
    return {token for token in stop if type(token) is int}


def turn_ends(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that the tokenizer's chat template ends an assistant's turn with; none without a template."""
    if not tokenizer.chat_template:
        return set()
    stops = Renderer(ChatTemplate(require_stop=False), tokenizer).stops
    return set(map(tokenizer.convert_tokens_to_ids, stops))


def max_positions(model: "PreTrainedModel") -> int | None:
    """The most tokens of a model with learned positions; None: rotary ones have no limit."""
    return learned_positions_of(model.config.to_dict())


def check_fits(
    model: "PreTrainedModel", sequences: Iterable["Sequence[int] | np.ndarray"], new_tokens: int = 0
) -> None:
    """Check that a model can read token sequences, and `new_tokens` tokens after each.

    Raises:
        UserError: one is empty, too long for learned positions, or of a different vocabulary.
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    longest = max_positions(model)
    for ids in sequences:
        if not len(ids):
            raise UserError("the prompt is empty, and without a chat template that is no token")
        largest = int(np.max(ids))
        if largest >= vocab_size:
            raise UserError(
                f"template: token {largest} has no embedding, the model has {vocab_size}; "
                "the tokenizer is a different model's"
            )
        if longest and len(ids) + new_tokens > longest:
            raise UserError(f"{len(ids)} tokens, and the model has {longest} positions; make it shorter")


def beyond_positions(model: "PreTrainedModel", prompts: Sequence[Sequence[int]]) -> str | None:
    """Say which prompts are longer than a model with rotary positions was made for; None: none is."""
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if not positions or longest <= positions:
        return None
    return f"a prompt has {longest} tokens, the model's max_position_embeddings is {positions}: answers may be worse"


def batches(
    prompts: Sequence[Sequence[int]], most: int, positions: int | None, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Yield (indices of prompts, most new tokens of each), the longest prompts first.

    Prompts are together only where their answers may be equally long, so that none is cut short by another's length.

    Args:
        prompts: token ids each.
        most: new tokens of an answer where there is room for them.
        positions: of the model; None: it has no limit.
        batch_size: prompts at once.
    """

    def room(index: int) -> int:
        if positions is None:
            return most
        return min(most, positions - len(prompts[index]))

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for new_tokens, alike in itertools.groupby(order, room):
        for chosen in itertools.batched(alike, batch_size):
            yield list(chosen), new_tokens


def continuations(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    pad_id: int,
    sampling: Sampling,
    batch_size: int = 8,
    streamer: "BaseStreamer | None" = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt, the longest first so that what doesn't fit in memory fails at once.

    Args:
        model: as posttrain.generate.live_model.load_model returns it.
        prompts: token ids each.
        stop: ids that end an answer; the one met is not part of it.
        pad_id: any valid id; prompts of a batch are padded on their left and the padding is masked.
        sampling: how to choose tokens.
        batch_size: prompts at once.
        streamer: gets each batch's prompts, then its tokens as they come; see posttrain.generate.token_stream.

    Yields:
        (index of the prompt, ids of its answer).
    """
    torch.manual_seed(sampling.seed)
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    for chosen, new_tokens in batches(prompts, sampling.max_new_tokens, max_positions(model), batch_size):
        longest = len(prompts[chosen[0]])
        padding = [longest - len(prompts[index]) for index in chosen]
        ids = torch.full((len(chosen), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, padding[row] :] = torch.tensor(prompts[index])
            mask[row, padding[row] :] = 1
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(stop) or None,
            pad_token_id=pad_id,
            **drawn,
        )
        processors = LogitsProcessorList([CheckedLogits()])
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenalty(sampling.repetition_penalty, padding))
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=processors,
                streamer=streamer,
            )
        for row, index in enumerate(chosen):
            yield index, _until_stop(out[row, longest:].tolist(), stop)


def _until_stop(ids: list[int], stop: set[int]) -> list[int]:
    """The ids before the first stop token."""
    for position, token in enumerate(ids):
        if token in stop:
            return ids[:position]
    return ids
