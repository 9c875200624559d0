"""From packed rows to Megatron's micro-batches: the order of rows, and the keys its forward step reads.

The order is a pure function of the seed and the global index, so a resumed run, or one with another data-parallel
size, sees the same global batches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class TrainOrder(Dataset):
    """Rows in a new seeded permutation each epoch, addressed by the global index over all epochs.

    Args:
        rows: the packed dataset; see posttrain.data.
        samples: how many rows the run takes in all.
        seed: of the permutations.
        collate_fn: list of rows -> batch.
    """

    def __init__(self, rows: Sequence[Any], samples: int, seed: int, collate_fn: Callable) -> None:
        self.rows, self.samples, self.seed, self.collate_fn = rows, samples, seed, collate_fn
        self._epoch, self._permutation = -1, None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(index), len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self.rows[int(self._permutation[place])]


class ValidationOrder(Dataset):
    """Every row once, filled up with rows of padding to whole global batches.

    Args:
        rows: the packed dataset.
        samples: rows to give, padding included.
        blank: a row of padding.
        collate_fn: list of rows -> batch.
    """

    def __init__(self, rows: Sequence[Any], samples: int, blank: dict[str, np.ndarray], collate_fn: Callable) -> None:
        self.rows, self.samples, self.blank, self.collate_fn = rows, samples, blank, collate_fn

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[index] if index < len(self.rows) else self.blank


def blank_row(length: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row of `length` padding tokens, none of them trained."""
    ids = np.full(length, pad_id, np.int32)
    zeros = np.zeros(length, np.uint8)
    position = np.arange(length, dtype=np.int32)
    return {"input_ids": ids, "labels": ids, "loss_mask": zeros, "position_ids": position,
            "seq_lens": np.array([length], np.int32)}  # fmt: skip


class Collate:
    """Rows -> one micro-batch in the keys that megatron.bridge.training.gpt_step reads, and its counts.

    Args:
        length: tokens that each row is padded to; None: rows are joined without padding.
        pad_id: padding token.
        multiple: the whole is padded to a multiple of this (tensor x context parallel size).
    """

    def __init__(self, length: int | None, pad_id: int, multiple: int = 1) -> None:
        self.length, self.pad_id, self.multiple = length, pad_id, multiple

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        import torch

        from posttrain.data.collate import collate

        batch = collate(rows, self.length, self.pad_id, pad_multiple=self.multiple)
        lengths = np.concatenate([row["seq_lens"] for row in rows]).astype(np.int64)
        trained = int(sum(int(row["loss_mask"].sum()) for row in rows))
        cu_seqlens = batch["cu_seqlens"]
        max_seqlen = torch.tensor(int(batch["max_seqlen"]), dtype=torch.int32)
        return {
            "tokens": batch["tokens"].long(),
            "labels": batch["labels"].long(),
            "loss_mask": batch["loss_mask"].float(),
            "position_ids": batch["position_ids"].long(),
            "attention_mask": None,
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_kv": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_kv": max_seqlen,
            # Counts stay on the host: reading them must not wait for the device.
            "counts": [trained, int(lengths.sum()) if trained else 0, int((lengths**2).sum()) if trained else 0,
                       int(batch["tokens"].numel())],
        }  # fmt: skip


class Counts:
    """What this process has been given since the last `take`: trained, real and all tokens, sum of squared lengths."""

    names = ("trained_tokens", "tokens", "squared_lengths", "padded_tokens")

    def __init__(self) -> None:
        self.totals = [0, 0, 0, 0]

    def tap(self, iterator: Iterator[dict[str, Any]]) -> "Tapped":
        """`iterator`, adding up what goes through it."""
        return Tapped(iterator, self)

    def take(self) -> list[int]:
        """The totals, which start again from zero."""
        totals, self.totals = self.totals, [0, 0, 0, 0]
        return totals


class Tapped:
    """An iterator whose batches are counted; see `Counts.tap`."""

    def __init__(self, iterator: Iterator[dict[str, Any]], counts: Counts) -> None:
        self.iterator, self.counts = iterator, counts

    def __iter__(self) -> "Tapped":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self.iterator)
        self.counts.totals = [total + count for total, count in zip(self.counts.totals, batch["counts"], strict=True)]
        return batch
