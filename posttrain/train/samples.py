"""Answers of the live model to validation prompts, before, during and after training."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model

from posttrain.config.schema import TrainerSchema
from posttrain.ops.linear_cross_entropy import token_logits
from posttrain.spec.run_spec import RunSpec
from posttrain.utils import working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.dataset import PackedDataset

SAMPLING = "sampling"  # a phase
WHOLE_ROW = 64  # tokens in whose multiples a text is computed without a cache: few shapes, equal parts
log = logging.getLogger(__name__)


class Sampler:
    """Greedy answers to the first validation conversations.

    Args:
        validation: the split; None: there is none, and no answers.
        tokenizer: the model's.
        spec: of the run; every layer and whole sequences have to be in one process.
        settings: how many answers, and how long.

    Attributes:
        records: per prompt: prompt, before, after, reference; text.
    """

    def __init__(
        self,
        validation: "PackedDataset | None",
        tokenizer: "PreTrainedTokenizerFast",
        spec: RunSpec,
        settings: TrainerSchema,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = settings.max_new_tokens
        self.records: list[dict[str, str]] = []
        self.prompts: list[tuple[list[int], list[int]]] = []
        if not validation:
            return
        if not spec.whole_in_one:
            log.info("no sample answers: %s", spec.sample_answers.reason)
            return
        self.prompts = list(islice(split_answers(validation), settings.num_generations))

    @property
    def comparison(self) -> list[dict[str, str]]:
        """The records, none where this run asks nothing: those of a resumed one lack its last answers."""
        if not self.prompts:
            return []
        return self.records

    def run(self, model: list[torch.nn.Module], when: str | None) -> list[dict[str, str]]:
        """Answer every prompt, and keep the text under `when` unless that is None; a collective call.

        Returns:
            prompt, answer and reference of each.
        """
        answers = []
        for index, (prompt, reference) in enumerate(working.counted(self.prompts, SAMPLING, len(self.prompts))):
            stop = {reference[-1], self.tokenizer.eos_token_id}
            answer = self.decode(greedy(model[0], prompt, stop, self.max_new_tokens))
            if len(self.records) <= index:
                self.records.append({"prompt": self.decode(prompt).strip(), "reference": self.decode(reference)})
            record = self.records[index]
            if when is not None:
                record[when] = answer
            answers.append({"prompt": record["prompt"], "answer": answer, "reference": record["reference"]})
        return answers

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, without special ones."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def split_answers(rows: "PackedDataset") -> Iterator[tuple[list[int], list[int]]]:
    """Yield (prompt ids, reference ids) of each conversation: what is before its first supervised span, and that."""
    for index in range(len(rows)):
        row = rows[index]
        start = 0
        for length in row["seq_lens"].tolist():
            piece = slice(start, start + length)
            start += length
            mask = row["loss_mask"][piece]
            supervised = mask.nonzero()[0]
            if not len(supervised):
                continue
            first = int(supervised[0])
            gaps = np.flatnonzero(mask[first:] == 0)
            end = first + int(gaps[0]) if len(gaps) else length
            yield row["input_ids"][piece][: first + 1].tolist(), row["labels"][piece][first:end].tolist()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], stop: set[int], max_new_tokens: int) -> list[int]:
    """The most likely continuation of one prompt; a collective call.

    Args:
        model: a Megatron GPT model, wrapped or not; one pipeline stage.
        prompt: token ids.
        stop: ids after which to end; the one met is not returned.
        max_new_tokens: most tokens to return.
    """
    plain = unwrap_model(model)
    was_training = plain.training
    plain.eval()
    next_logits: Callable[[list[int]], torch.Tensor] = partial(_whole_row_logits, plain)
    if not get_model_config(plain).sequence_parallel:
        next_logits = Cached(plain, len(prompt) + max_new_tokens)
    found: list[int] = []
    try:
        while len(found) < max_new_tokens:
            likeliest = next_logits([*prompt, *found]).argmax()
            torch.distributed.broadcast(likeliest, src=0)  # or one that stops earlier leaves the others waiting
            token = int(likeliest)
            if token in stop:
                break
            found.append(token)
    finally:
        plain.train(was_training)
    return found


class Cached:
    """Logits of the token after a text that grows by a token at a time, with Megatron's key-value cache.

    Args:
        model: not wrapped.
        longest: tokens of the text in the end.
    """

    def __init__(self, model: torch.nn.Module, longest: int) -> None:
        self.model = model
        self.rows = get_attr_wrapped_model(model, "vocab_size")
        self.context = StaticInferenceContext(max_batch_size=1, max_sequence_length=longest)
        self.seen = 0

    def __call__(self, text: list[int]) -> torch.Tensor:
        """float[vocabulary as padded], of all token ids so far."""
        ids = torch.tensor([text[self.seen :]], device="cuda")
        positions = torch.arange(self.seen, len(text), device="cuda")[None]
        logits = self.model(ids, positions, None, inference_context=self.context, runtime_gather_output=True)
        if logits.size(-1) * parallel_state.get_tensor_model_parallel_world_size() == self.rows:
            logits = gather_from_tensor_model_parallel_region(logits)
        self.context.increment_sequence_len_offset(len(text) - self.seen)
        self.seen = len(text)
        return cast(torch.Tensor, logits[0, -1])


def _whole_row_logits(model: torch.nn.Module, text: list[int]) -> torch.Tensor:
    """float[vocabulary as padded] of the token after `text`, all of which is computed, as in training.

    Sequence parallelism divides a row's tokens; the one token that a cache leaves can't be divided.
    """
    last = len(text) - 1
    length = math.ceil(len(text) / WHOLE_ROW) * WHOLE_ROW
    row = torch.tensor([text + text[-1:] * (length - len(text))], device="cuda")  # no token sees a later one
    ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length
    )
    return cast(
        torch.Tensor,
        model(
            row,
            torch.arange(length, device="cuda").clamp(max=last)[None],  # learned ones end
            None,
            packed_seq_params=packed,
            output_processor=token_logits,
            output_processor_context=last,
        ),
    )
