"""From packed rows to Megatron's micro-batches: the order of rows, and the keys its forward step reads.

The order is a pure function of the seed, the batch's size and the global index, so a resumed run, or one with another
data-parallel size, sees the same global batches.
"""

import operator
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from posttrain.data.collate import collate_items
from posttrain.errors import UserError
from posttrain.spec.epochs import Epoch

WHOLE = 0.01  # how far a sum of weights may be from a whole number, by rounding


class Rows(Protocol):
    """Packed sequences; see posttrain.data.dataset.PackedDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TrainOrder(Dataset):
    """Rows in a new seeded permutation each epoch, addressed by the global index over the places of all steps.

    Args:
        rows: the packed dataset; see posttrain.data.
        batch: places of a step, of which an epoch's last may leave some empty; see posttrain.spec.epochs.
        steps: of the run.
        seed: of the permutations.
        collate_fn: list of rows -> batch.
        blank: what is in an empty place.
        skip: first places of steps that are left out, ascending; see rollback.py.
    """

    def __init__(
        self,
        rows: Rows,
        batch: int,
        steps: int,
        seed: int,
        collate_fn: Callable | None,
        blank: dict[str, np.ndarray],
        skip: Sequence[int] = (),
    ) -> None:
        self.rows = rows
        self.epoch = Epoch(len(rows), batch)
        self.steps = steps
        self.seed = seed
        self.collate_fn = collate_fn
        self.blank = blank
        self.skip = skip
        self._shuffled = -1
        self._permutation = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.steps * self.epoch.batch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.row_at(int(index))
        return self.blank if row is None else self.rows[row]

    def row_at(self, index: int) -> int | None:
        """Which row has the global index `index`; None: the place is empty."""
        number, place = divmod(self.place(index), self.epoch.places)
        if place >= self.epoch.rows:
            return None
        if number != self._shuffled:
            self._shuffled = number
            self._permutation = np.random.default_rng([self.seed, number]).permutation(self.epoch.rows)
        return int(self._permutation[place])

    def place(self, index: int) -> int:
        """Where the global index `index` is in the order without gaps."""
        for first in self.skip:
            if index < first:
                break
            index += self.epoch.batch
        return index

    def passes(self, steps: int) -> float:
        """Passes over the rows in the run's first `steps` steps, with those left out until then."""
        last = self.place(steps * self.epoch.batch - 1)
        return self.epoch.trained((last + 1) // self.epoch.batch) / self.epoch.rows


def describe_rows(order: TrainOrder, first: int, count: int, most: int = 32) -> str:
    """The rows at `count` places from the global index `first` on, in words; at most `most` of them."""
    places = map(order.row_at, range(first, first + count))
    rows = [row for row in places if row is not None]
    listed = ", ".join(map(str, rows[:most]))
    return f"{listed}, ..." if len(rows) > most else listed


class ValidationOrder(Dataset):
    """Every row once, filled up with rows of padding to whole global batches; of more rows than asked for a sample.

    Args:
        rows: the packed dataset, whose rows are sorted by the lengths in them.
        samples: rows to give, padding included.
        blank: a row of padding.
        collate_fn: list of rows -> batch.
        seed: of the sample.
    """

    def __init__(self, rows: Rows, samples: int, blank: dict[str, np.ndarray], collate_fn: Callable, seed: int) -> None:
        self.rows = rows
        self.samples = samples
        self.blank = blank
        self.collate_fn = collate_fn
        shuffled = np.random.default_rng(seed).permutation(len(rows))
        self.chosen = np.sort(shuffled[:samples]).tolist()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[self.chosen[index]] if index < len(self.chosen) else self.blank


def blank_row(length: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row of `length` padding tokens, none of them supervised."""
    ids = np.full(length, pad_id, np.int32)
    zeros = np.zeros(length, np.uint8)
    position = np.arange(length, dtype=np.int32)
    return {
        "input_ids": ids,
        "labels": ids,
        "loss_mask": zeros,
        "position_ids": position,
        "seq_lens": np.array([length], np.int32),
    }


class Counts(NamedTuple):
    """What was in some batches.

    Attributes:
        supervised_tokens, tokens, padded_tokens: supervised and real tokens, and all with padding.
        squared_lengths: sum of the squares of the sequences' lengths.
        checksum: sum of the rows' checksums, which tells one global batch from another however it is divided.
        waited_seconds: for which the training process waited for them.
        step_seconds: of the steps that trained on them.
    """

    supervised_tokens: float = 0.0
    tokens: float = 0.0
    squared_lengths: float = 0.0
    padded_tokens: float = 0.0
    checksum: float = 0.0
    waited_seconds: float = 0.0
    step_seconds: float = 0.0

    def plus(self, other: "Counts") -> "Counts":
        """The sums of both."""
        return Counts(*map(operator.add, self, other))


class Collate:
    """Rows -> one micro-batch as `posttrain.objectives.token_loss.TokenLoss` reads it, and its counts.

    Args:
        length: tokens that each row is padded to; None: rows are joined without padding.
        pad_id: padding token.
        weights: what each label of a row counts; see posttrain.objectives.Objective.
        multiple: the whole is padded to a multiple of this (tensor x context parallel size).
        sequences: fill the boundaries up to this many sequences, the last ones empty; None: as many as there are.
            With `length` every batch then has the same shapes, which a CUDA graph needs.
        supervised: fill the supervised positions up to this many; None: as many as there are.
        pad_blank: whether a micro-batch without a supervised token is padded to `length` as well.
        whole: whether each row is one sequence (and padding), which attention then takes without boundaries.
    """

    def __init__(
        self,
        length: int | None,
        pad_id: int,
        weights: Callable[[dict[str, np.ndarray]], np.ndarray],
        multiple: int = 1,
        sequences: int | None = None,
        supervised: int | None = None,
        pad_blank: bool = True,
        whole: bool = False,
    ) -> None:
        self.length = length
        self.pad_id = pad_id
        self.weights = weights
        self.multiple = multiple
        self.sequences = sequences
        self.supervised = supervised
        self.pad_blank = pad_blank
        self.whole = whole

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Collate.

        Returns:
            tokens, labels, position_ids int64[1, t]; loss_mask float32[1, t], the weights; cu_seqlens_q int32[n + 1];
            max_seqlen an int; whole_rows, how many rows there are where each is one sequence, else 0;
            supervised_at int64[k], positions with a weight, filled up with position 0;
            supervised_mask float32[1, k], their weights, 0 where filled up; normalizer int32[], the sum of all
            weights; counts.
        """
        weighted = [row | {"loss_mask": self.weights(row)} for row in rows]
        length = self.length
        if not self.pad_blank and not any(row["loss_mask"].any() for row in rows):
            length = None
        batch = collate_items(weighted, length, self.pad_id, pad_multiple=self.multiple)
        weights = batch["loss_mask"][0]
        ends = batch["cu_seqlens"]
        longest = int(ends.diff().max())
        if self.sequences is not None:
            ends = torch.cat([ends, ends[-1:].expand(self.sequences + 1 - len(ends))])
            longest = self.length or longest
        at = weights.nonzero()[:, 0]
        # Never none: a micro-batch of padding still has to pass through the output layer on every rank.
        fill = len(at)
        if self.supervised is not None or not fill:
            fill = max(self.supervised or 0, 1)
        if len(at) > fill:
            raise ValueError(f"a micro-batch has {len(at)} supervised tokens, more than the {fill} that were counted")
        supervised_at = torch.zeros(fill, dtype=torch.int64)
        supervised_at[: len(at)] = at
        supervised_mask = torch.zeros(1, fill)
        supervised_mask[0, : len(at)] = weights[at]
        total = float(weights.double().sum())
        if abs(total - round(total)) > WHOLE:
            raise UserError(
                f"objective: the weights of a micro-batch sum to {total:.4f}; those of each row must sum to a whole "
                "number, of tokens or of conversations, by which a step's loss is divided"
            )
        return {
            "tokens": batch["tokens"],
            "labels": batch["labels"],
            "loss_mask": batch["loss_mask"],
            "position_ids": batch["position_ids"],
            "cu_seqlens_q": ends,
            "max_seqlen": longest,
            "whole_rows": len(rows) * int(self.whole and length is not None),
            "supervised_at": supervised_at,
            "supervised_mask": supervised_mask,
            "normalizer": torch.tensor(round(total), dtype=torch.int32),
            "counts": count(rows, len(at), batch["tokens"].numel()),
        }


def count(rows: list[dict[str, np.ndarray]], supervised: int, padded: int) -> Counts:
    """Count a micro-batch; on the host, since reading its tensors would wait for the device. Padding is no work."""
    if not supervised:
        return Counts(padded_tokens=padded)
    lengths = np.concatenate([row["seq_lens"] for row in rows]).astype(np.int64)
    checksum = 0
    for row in rows:
        if row["loss_mask"].any():
            checksum += zlib.crc32(row["input_ids"].tobytes())
    return Counts(
        supervised_tokens=supervised,
        tokens=int(lengths.sum()),
        squared_lengths=int((lengths**2).sum()),
        padded_tokens=padded,
        checksum=checksum,
    )


class CountingIterator:
    """An iterator over batches that adds up what it gives, and keeps the counts out of the batches.

    Args:
        batches: what it gives.
        beat: called for each, as a sign of life.

    Attributes:
        totals: since the last `take`.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], beat: Callable[[], None] | None = None) -> None:
        self.batches = batches
        self.totals = Counts()
        self.beat = beat

    def __iter__(self) -> "CountingIterator":
        return self

    def __next__(self) -> dict[str, Any]:
        if self.beat:
            self.beat()
        began = time.perf_counter()
        batch = next(self.batches)
        counts: Counts = batch.pop("counts")
        self.totals = self.totals.plus(counts._replace(waited_seconds=time.perf_counter() - began))
        return batch

    def take(self) -> Counts:
        """The totals, which start again from zero."""
        totals = self.totals
        self.totals = Counts()
        return totals
