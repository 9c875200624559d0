"""Answers of the live model to validation prompts, before, during and after training."""

import logging
from typing import Any

import torch
from megatron.core.utils import unwrap_model

log = logging.getLogger(__name__)


class Sampler:
    """Greedy answers to the first validation conversations.

    Args:
        trainer: the run's trainer.

    Attributes:
        records: per prompt: prompt, before, after, reference; text.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.records: list[dict[str, str]] = []
        self.prompts = list(self._prompts(trainer.settings.num_generations)) if self._possible() else []

    def _possible(self) -> bool:
        p = self.trainer.parallelism
        if not self.trainer.splits.validation:
            return False
        if p.pipeline_model_parallel_size > 1 or p.context_parallel_size > 1:
            log.info("no sample answers: generation from the live model needs all layers in each process")
            return False
        return True

    def _prompts(self, count: int):
        """Yield (prompt ids, reference ids) of the first `count` conversations with something trained."""
        for row in self.trainer.splits.validation:
            start = 0
            for length in row["seq_lens"]:
                piece = slice(start, start + int(length))
                start += int(length)
                trained = row["loss_mask"][piece].nonzero()[0]
                if not len(trained):
                    continue
                if count == 0:
                    return
                count -= 1
                first = int(trained[0])
                last = first
                while last + 1 < length and row["loss_mask"][piece][last + 1]:
                    last += 1
                ids, labels = row["input_ids"][piece], row["labels"][piece]
                yield ids[: first + 1].tolist(), labels[first : last + 1].tolist()

    def run(self, model: list[torch.nn.Module], when: str | None) -> list[dict[str, str]]:
        """Answer every prompt, and keep the text under `when` unless that is None; a collective call.

        Returns:
            prompt, answer and reference of each.
        """
        tokenizer, found = self.trainer.tokenizer, []
        for index, (prompt, reference) in enumerate(self.prompts):
            answer = greedy(
                model[0], prompt, {reference[-1], tokenizer.eos_token_id}, self.trainer.settings.max_new_tokens
            )
            if len(self.records) <= index:
                self.records.append({
                    "prompt": tokenizer.decode(prompt, skip_special_tokens=True).strip(),
                    "reference": tokenizer.decode(reference, skip_special_tokens=True),
                })  # fmt: skip
            text, record = tokenizer.decode(answer, skip_special_tokens=True), self.records[index]
            if when is not None:
                record[when] = text
            found.append({"prompt": record["prompt"], "answer": text, "reference": record["reference"]})
        return found


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], stop: set[int], max_new_tokens: int) -> list[int]:
    """The most likely continuation of one prompt, with Megatron's key-value cache.

    Args:
        model: a Megatron GPT model, wrapped or not; one pipeline stage.
        prompt: token ids.
        stop: ids after which to end; the one met is not returned.
        max_new_tokens: most tokens to return.
    """
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    plain = unwrap_model(model)
    was_training = plain.training
    plain.eval()
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + max_new_tokens)
    found: list[int] = []
    step, position = prompt, 0
    try:
        while len(found) < max_new_tokens:
            ids = torch.tensor([step], device="cuda")
            positions = torch.arange(position, position + len(step), device="cuda")[None]
            logits = plain(ids, positions, None, inference_context=context, runtime_gather_output=True)
            if logits.size(-1) * parallel_state.get_tensor_model_parallel_world_size() == plain.vocab_size:
                logits = gather_from_tensor_model_parallel_region(logits)
            token = int(logits[0, -1].argmax())
            if token in stop:
                break
            found.append(token)
            context.increment_sequence_len_offset(len(step))
            position += len(step)
            step = [token]
    finally:
        plain.train(was_training)
    return found
