"""Losses of conversations by a transformers model, summed over their trained tokens."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy


def losses(
    model: Any, ids: Sequence[np.ndarray], masks: Sequence[np.ndarray], batch_tokens: int
) -> Iterator[tuple[int, float, int]]:
    """Go through all conversations, the longest first so that what doesn't fit in memory fails at once.

    Each conversation stands in a row of its own, padded on its right: no conversation sees another.

    Args:
        model: of transformers, or PEFT's around one.
        ids, masks: token ids int[n], and 1 where a token is trained.
        batch_tokens: most tokens of a batch, padding included; one conversation may be longer.

    Yields:
        (index, sum of the trained tokens' losses in nats, number of trained tokens). The first token is predicted from
        nothing and never counts.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    selects = "logits_to_keep" in inspect.signature(plain.forward).parameters
    for chosen in batches([len(row) for row in ids], batch_tokens):
        longest = len(ids[chosen[0]])
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        real, trained = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for row, index in enumerate(chosen):
            size = len(ids[index])
            tokens[row, :size] = torch.from_numpy(ids[index].astype(np.int64))
            real[row, :size] = 1
            trained[row, : size - 1] = torch.from_numpy(masks[index][1:].astype(np.int64))
        at = trained.any(0).nonzero()[:, 0]  # positions whose next token is trained in any row: no logits for others
        batch = {"input_ids": tokens.to(model.device), "attention_mask": real.to(model.device), "use_cache": False}
        if selects:
            batch["logits_to_keep"] = at.to(model.device)
        with torch.no_grad():
            logits = model(**batch).logits
        if logits.size(1) != len(at):
            logits = logits[:, at.to(logits.device)]
        labels = tokens[:, at + 1].to(logits.device)
        for row, index in enumerate(chosen):
            wanted = trained[row, at].bool().to(logits.device)
            found = cross_entropy(logits[row, wanted].float(), labels[row, wanted], reduction="none")
            yield index, found.double().sum().item(), len(found)


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in descending order of length, cut so that rows x longest row is at most `most`, one row at least."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, most // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count
