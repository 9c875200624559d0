"""Continue token sequences with a transformers model.

In batches, with its key-value cache, up to a stop token.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.models.families import learned_positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the most likely token each time.
        top_p: sample from the most likely tokens of this total.
        top_k: sample from this many tokens; 0: from all.
        repetition_penalty: above 1 makes tokens that occur already less likely.
        seed: of the sampling; each batch has its own draw.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return `transformers`' arguments, with nothing left to a model's generation_config.json."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": 1,
            "do_sample": self.temperature > 0,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if self.temperature > 0:
            arguments |= {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return arguments


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


def continuations(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    pad_id: int,
    sampling: Sampling,
    batch_size: int = 8,
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt, the longest first so that what doesn't fit in memory fails at once.

    Args:
        model: of transformers, or PEFT's around one.
        prompts: token ids each.
        stop: ids that end an answer; the one met is not part of it.
        pad_id: any valid id; prompts of a batch are padded on their left and the padding is masked.
        sampling: how to choose tokens.
        batch_size: prompts at once.

    Yields:
        (index of the prompt, ids of its answer).
    """
    torch.manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(prompts[chosen[0]])
        ids = torch.full((len(chosen), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            size = len(prompts[index])
            ids[row, longest - size :] = torch.tensor(prompts[index])
            mask[row, longest - size :] = 1
        arguments = sampling.arguments()
        positions = max_positions(model)
        if positions is not None:
            arguments["max_new_tokens"] = min(sampling.max_new_tokens, positions - longest)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                eos_token_id=sorted(stop) or None,
                pad_token_id=pad_id,
                use_cache=True,
                **arguments,
            )
        for row, index in enumerate(chosen):
            yield index, _until_stop(out[row, longest:].tolist(), stop)


def _until_stop(ids: list[int], stop: set[int]) -> list[int]:
    """The ids before the first stop token."""
    for position, token in enumerate(ids):
        if token in stop:
            return ids[:position]
    return ids
