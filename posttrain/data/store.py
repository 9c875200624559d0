"""Encoded conversations in Arrow files on disk, read through memory maps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from posttrain.data.prepare import Sample

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.uint8())),
        ("supervised", pa.int32()),  # tokens with mask 1, the first one left out
        ("digest", pa.int64()),  # of what is said; equal for duplicates
        ("row", pa.int64()),  # index in the file it comes from
        ("category", pa.string()),  # of the row, where it was asked for
        ("tree", pa.int64()),  # equal for conversations that a split keeps together; 0: by itself
    ]
)


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """An array without a copy. (`pa.array` would import pandas on its first call, half a second.)"""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(list(map(len, arrays)))]).astype(np.int32)
    return pa.ListArray.from_arrays(_column(offsets, pa.int32()), _column(np.concatenate(arrays), kind))


def _numpy(array: pa.Array, kind: type) -> np.ndarray:
    """A view of an array without nulls. (`to_numpy` would import pandas.)"""
    if not len(array):
        return np.empty(0, kind)
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array)]


class Writer:
    """Writes batches of samples to one file; a context manager."""

    def __init__(self, path: Path):
        self._file = pa.ipc.new_file(str(path), _SCHEMA)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, samples: Sequence[Sample]) -> None:
        if not samples:
            return
        ids, sample_masks, digests, rows, categories, trees = [], [], [], [], [], []
        for sample in samples:
            ids.append(sample.encoded.input_ids)
            sample_masks.append(sample.encoded.mask)
            digests.append(sample.digest)
            rows.append(sample.place.row)
            categories.append(sample.place.category)
            trees.append(sample.tree or 0)
        masks = _lists(sample_masks, pa.uint8())
        starts, flat = _numpy(masks.offsets, np.int32)[:-1], _numpy(masks.values, np.uint8)
        category = pa.nulls(len(samples), pa.string())
        if any(categories):
            category = pa.array(categories, pa.string())
        columns = [
            _lists(ids, pa.int32()),
            masks,
            _column(np.add.reduceat(flat, starts, dtype=np.int32) - flat[starts], pa.int32()),
            _column(np.array(digests, np.int64), pa.int64()),
            _column(np.array(rows, np.int64), pa.int64()),
            category,
            _column(np.array(trees, np.int64), pa.int64()),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=_SCHEMA))


class Store:
    """The conversations of several files under one running index.

    Attributes:
        lengths: int64[n], tokens per conversation.
        supervised: int32[n], supervised tokens per conversation.
        digests: int64[n].
        rows: int64[n], index of the conversation's row in its file.
        trees: int64[n], equal for the conversations of a tree; 0: by itself.
        sources: int64[n], which of `paths` it is in.
    """

    def __init__(self, paths: Sequence[Path | str]):
        self.paths = list(map(str, paths))
        self._open()

    def _open(self) -> None:
        batches, sources = [], []
        for source, path in enumerate(self.paths):
            file = pa.ipc.open_file(pa.memory_map(path))
            batches += [file.get_batch(i) for i in range(file.num_record_batches)]
            sources += [source] * file.num_record_batches
        sizes = [batch.num_rows for batch in batches]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._offsets, self._ids, self._masks = [], [], []
        for batch in batches:
            ids, mask = batch.column(0), batch.column(1)
            self._offsets.append(_numpy(ids.offsets, np.int32))
            self._ids.append(_numpy(ids.values, np.int32))
            self._masks.append(_numpy(mask.values, np.uint8))
        self._batches = batches
        self.lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, self._offsets)]).astype(np.int64)
        self.supervised = self._numbers(2, np.int32)
        self.digests = self._numbers(3, np.int64)
        self.rows = self._numbers(4, np.int64)
        self.trees = self._numbers(6, np.int64)
        self.sources = np.repeat(np.array(sources, np.int64), sizes)

    def _numbers(self, column: int, kind: type) -> np.ndarray:
        """A column of numbers of all files."""
        parts = [_numpy(batch.column(column), kind) for batch in self._batches]
        return np.concatenate([np.empty(0, kind), *parts])

    def categories(self) -> list[str | None]:
        """Of every row, as it was named by the column that was asked for."""
        names: list[str | None] = []
        for batch in self._batches:
            names += batch.column(5).to_pylist()
        return names

    def __getstate__(self):
        return {"paths": self.paths}  # loader processes map the files themselves

    def __setstate__(self, state):
        self.paths = state["paths"]
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32[n] and mask uint8[n] of a conversation, without a copy."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets, at = self._offsets[batch], index - self._starts[batch]
        cut = slice(offsets[at], offsets[at + 1])
        return self._ids[batch][cut], self._masks[batch][cut]
