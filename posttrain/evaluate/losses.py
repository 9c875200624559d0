"""Losses of conversations by a transformers model, summed over their supervised tokens."""

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def compute_losses(
    model: "PreTrainedModel | PeftModel",
    ids: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    batch_tokens: int,
) -> Iterator[tuple[int, float, int]]:
    """Compute the loss of every conversation.

    The longest come first, so that what doesn't fit in memory fails at once. Each conversation
    stands in a row of its own, padded on its right: no conversation sees another.

    Args:
        model: of transformers, or PEFT's around one.
        ids: token ids int[n] of each conversation.
        masks: int[n] of each conversation, 1 where a token is supervised.
        batch_tokens: most tokens of a batch, padding included; one conversation may be longer.

    Yields:
        (index, sum of the supervised tokens' losses in nats, number of supervised tokens). The first
        token is predicted from nothing and never counts.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    takes_positions = "logits_to_keep" in inspect.signature(base.forward).parameters
    for chosen in batches(list(map(len, ids)), batch_tokens):
        longest = len(ids[chosen[0]])
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(tokens)
        supervised = torch.zeros_like(tokens)  # 1 where the next token is supervised
        for row, index in enumerate(chosen):
            size = len(ids[index])
            tokens[row, :size] = torch.from_numpy(ids[index].astype(np.int64))
            attention_mask[row, :size] = 1
            supervised[row, : size - 1] = torch.from_numpy(masks[index][1:].astype(np.int64))
        # Logits only at positions whose next token is supervised in any row: int[p].
        positions = supervised.any(0).nonzero()[:, 0]
        batch = {
            "input_ids": tokens.to(model.device),
            "attention_mask": attention_mask.to(model.device),
            "use_cache": False,
        }
        if takes_positions:
            batch["logits_to_keep"] = positions.to(model.device)
        with torch.no_grad():
            logits = model(**batch).logits  # [rows, p or longest, vocabulary]
        if logits.size(1) != len(positions):
            logits = logits[:, positions.to(logits.device)]
        labels = tokens[:, positions + 1].to(logits.device)
        for row, index in enumerate(chosen):
            selected = supervised[row, positions].bool().to(logits.device)
            losses = cross_entropy(logits[row, selected].float(), labels[row, selected], reduction="none")
            yield index, losses.double().sum().item(), len(losses)


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices in descending order of length, in batches of at most `max_tokens` with padding.

    A batch has one conversation at least.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count
