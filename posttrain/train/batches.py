"""From packed rows to Megatron's micro-batches: the order of rows, and the keys its forward step reads.

The order is a pure function of the seed and the global index, so a resumed run, or one with another data-parallel
size, sees the same global batches.
"""

import time
import zlib
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
        skip: first places of batches that are left out, ascending; see rollback.py.
        batch: rows of each of them.
    """

    def __init__(
        self, rows: Sequence[Any], samples: int, seed: int, collate_fn: Callable, skip: Sequence[int] = (),
        batch: int = 0,
    ) -> None:  # fmt: skip
        self.rows, self.samples, self.seed, self.collate_fn = rows, samples, seed, collate_fn
        self.skip, self.batch = skip, batch
        self._epoch, self._permutation = -1, None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[self.row_at(int(index))]

    def row_at(self, index: int) -> int:
        """Which row has the global index `index`."""
        epoch, place = divmod(self.place(index), len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return int(self._permutation[place])

    def place(self, index: int) -> int:
        """Where the global index `index` is in the order without gaps."""
        for first in self.skip:
            if index < first:
                break
            index += self.batch
        return index


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
    """A row of `length` padding tokens, none of them supervised."""
    ids = np.full(length, pad_id, np.int32)
    zeros = np.zeros(length, np.uint8)
    position = np.arange(length, dtype=np.int32)
    return {"input_ids": ids, "labels": ids, "loss_mask": zeros, "position_ids": position,
            "seq_lens": np.array([length], np.int32)}  # fmt: skip


class Collate:
    """Rows -> one micro-batch as `posttrain.train.forward_step.forward_step` reads it, and its counts.

    Args:
        length: tokens that each row is padded to; None: rows are joined without padding.
        pad_id: padding token.
        multiple: the whole is padded to a multiple of this (tensor x context parallel size).
        sequences: fill the boundaries up to this many sequences, the last ones empty; None: as many as there are.
            With `length` every batch then has the same shapes, which a CUDA graph needs.
        supervised: fill the supervised positions up to this many; None: as many as there are.
    """

    def __init__(
        self, length: int | None, pad_id: int, multiple: int = 1, sequences: int | None = None,
        supervised: int | None = None,
    ) -> None:  # fmt: skip
        self.length, self.pad_id, self.multiple = length, pad_id, multiple
        self.sequences, self.supervised = sequences, supervised

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Collate.

        Returns:
            tokens, labels, position_ids int64[1, t]; loss_mask float32[1, t]; cu_seqlens_q int32[n + 1]; max_seqlen an
            int; supervised_at int64[k], positions with loss_mask 1, filled up with position 0; supervised_mask
            float32[1, k], 0 where filled up; counts, see Counted.
        """
        import torch

        from posttrain.data.collate import collate_items

        batch = collate_items(rows, self.length, self.pad_id, pad_multiple=self.multiple)
        lengths = np.concatenate([row["seq_lens"] for row in rows]).astype(np.int64)
        supervised = int(sum(int(row["loss_mask"].sum()) for row in rows))
        ends, longest = batch["cu_seqlens"], int(batch["max_seqlen"])
        if self.sequences is not None:
            ends = torch.cat([ends, ends[-1:].expand(self.sequences + 1 - len(ends))])
            longest = self.length
        at = batch["loss_mask"][0].nonzero()[:, 0]
        # Never none: a micro-batch of padding still has to pass through the output layer on every rank.
        fill = max(self.supervised or 0, 1) if self.supervised is not None or not len(at) else len(at)
        if len(at) > fill:
            raise ValueError(f"a micro-batch has {len(at)} supervised tokens, more than the {fill} that were counted")
        supervised_at = torch.zeros(fill, dtype=torch.int64)
        supervised_at[: len(at)] = at
        return {
            "tokens": batch["tokens"],
            "labels": batch["labels"],
            "loss_mask": batch["loss_mask"],
            "position_ids": batch["position_ids"],
            "cu_seqlens_q": ends,
            "max_seqlen": longest,
            "supervised_at": supervised_at,
            "supervised_mask": (torch.arange(fill) < len(at)).float()[None],
            # Counts stay on the host: reading them must not wait for the device. A row of padding is no work.
            "counts": [supervised,
                       int(lengths.sum()) if supervised else 0,
                       int((lengths**2).sum()) if supervised else 0,
                       int(batch["tokens"].numel()),
                       sum(zlib.crc32(row["input_ids"].tobytes()) for row in rows if row["loss_mask"].any())],
        }  # fmt: skip


class Counted:
    """An iterator over batches that adds up what it gives, and keeps the counts out of the batches.

    Args:
        batches: what it gives.
        beat: called for each, as a sign of life.

    Attributes:
        totals: supervised, real and all tokens, the sum of squared sequence lengths, and the sum of the rows'
            checksums, which tells one global batch from another however it is divided, and the seconds that the
            training process waited for them; since the last `take`.
    """

    names = ("supervised_tokens", "tokens", "squared_lengths", "padded_tokens", "checksum", "waited_seconds")

    def __init__(self, batches: Iterator[dict[str, Any]], beat: Callable[[], None] | None = None) -> None:
        self.batches, self.totals, self.beat = batches, [0.0] * len(self.names), beat

    def __iter__(self) -> "Counted":
        return self

    def __next__(self) -> dict[str, Any]:
        if self.beat:
            self.beat()
        began = time.perf_counter()
        batch = next(self.batches)
        counts = [*batch.pop("counts"), time.perf_counter() - began]
        self.totals = [total + count for total, count in zip(self.totals, counts, strict=True)]
        return batch

    def take(self) -> list[float]:
        """The totals, which start again from zero."""
        totals, self.totals = self.totals, [0.0] * len(self.names)
        return totals
