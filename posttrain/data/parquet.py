"""Rows of a Parquet file in bounded memory: what they take is known from Arrow's arrays before they become objects.

A text that many rows share stands in the file once. It is read that way too, as a dictionary and an index for each row,
and only the rows of a small part at a time become Python's objects.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from posttrain.data.arrow_values import plain_row
from posttrain.errors import UserError

BATCH = 1024  # rows that are read at once
PART = 64 << 20  # bytes of rows that are objects at once, unless one row has more
MAX_GROUP = 4 << 30  # bytes of a row group; those of known writers have a tenth of it
MAX_VALUES = 64 << 20  # of a column of lists, in a row group
# Encodings of texts that Arrow can read as dictionaries.
DICTIONARY = {"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"}
VALUE = 16  # bytes counted for each value besides its text


def rows(path: Path, max_row: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file.

    Args:
        path: the file.
        max_row: bytes that a row may have.

    Raises:
        UserError: a row, or a row group, is too large.
        pyarrow.ArrowException: not a Parquet file, or damaged.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        size = _batch_size(file, path)
        schema = pyarrow.schema([field.with_type(_without_views(field.type)) for field in file.schema_arrow])
        texts = _texts(file)
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UserError(f"data.path: {path}: several columns are called {twice[0]!r}; rename or drop all but one")
    first = 0
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        for group in range(file.num_row_groups):  # each has its own dictionary
            for batch in file.iter_batches(batch_size=size, row_groups=[group]):
                for part in _parts(batch, first, path, max_row):
                    yield from map(
                        plain_row, pyarrow.Table.from_batches([part]).cast(schema).to_pylist(maps_as_pydicts="strict")
                    )
                first += batch.num_rows


def _without_views(kind: pyarrow.DataType) -> pyarrow.DataType:
    """A type with plain texts in place of views, as Polars writes them: Arrow can't make those of a dictionary."""
    if kind == pyarrow.string_view():
        return pyarrow.string()
    if kind == pyarrow.binary_view():
        return pyarrow.binary()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_views(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(_without_views(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_without_views(kind.value_type))
    return kind


def _columns(file: pyarrow.parquet.ParquetFile) -> list[pyarrow.parquet.ColumnSchema]:
    return [file.schema.column(index) for index in range(len(file.schema))]


def _texts(file: pyarrow.parquet.ParquetFile) -> list[str]:
    """The columns of texts that Arrow can read as dictionaries."""
    found = []
    for number, column in enumerate(_columns(file)):
        encodings = set()
        for index in range(file.metadata.num_row_groups):
            encodings.update(file.metadata.row_group(index).column(number).encodings)
        if column.physical_type == "BYTE_ARRAY" and encodings <= DICTIONARY:
            found.append(column.path)
    return found


def _batch_size(file: pyarrow.parquet.ParquetFile, path: Path) -> int:
    """How many rows to read at once."""
    size = BATCH
    columns = _columns(file)
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        total = 0
        for number, column in enumerate(columns):
            chunk = group.column(number)
            total += chunk.total_uncompressed_size
            if column.max_repetition_level and chunk.num_values > max(MAX_VALUES, chunk.total_uncompressed_size):
                raise UserError(
                    f"data.path: {path}: row group {index} has {chunk.num_values:,} values of {column.path} in "
                    f"{chunk.total_uncompressed_size:,} bytes: lists without an end"
                )
            if "DELTA_BYTE_ARRAY" in chunk.encodings:  # any text may have the beginning of the one before
                size = min(size, max(1, MAX_GROUP // 4 // max(1, chunk.total_uncompressed_size)))
        if total > MAX_GROUP:
            raise UserError(
                f"data.path: {path}: row group {index} has {total:,} bytes, more than {MAX_GROUP >> 30} GiB; write the "
                "file with smaller row groups"
            )
    return size


def _parts(batch: pyarrow.RecordBatch, first: int, path: Path, max_row: int) -> Iterator[pyarrow.RecordBatch]:
    """Cut a batch, whose first row is the row `first` of the file, into parts of up to PART bytes.

    A row of more is a part of its own, so that the rows before a row that is refused are still read.
    """
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += _sizes(column)
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        if sizes[start] > max_row:
            raise UserError(f"data.path: {path}, row {first + start}: longer than {max_row >> 20} MiB")
        before = ends[start] - sizes[start]
        end = max(start + 1, int(np.searchsorted(ends, before + PART, side="right")))
        # Taken, not sliced: Arrow casts all that is behind a slice of lists.
        yield batch if end - start == len(sizes) else batch.take(pyarrow.array(np.arange(start, end)))
        start = end


def _sizes(array: pyarrow.Array) -> np.ndarray:
    """Bytes of each value of an array, [values], with everything in it each time that it is in it."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _sizes(array.storage)
    if types.is_dictionary(kind):
        if not len(array.dictionary):
            return np.full(len(array), VALUE)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return _sizes(array.dictionary)[indices]
    if types.is_struct(kind):
        sizes = np.full(len(array), VALUE)
        for index in range(kind.num_fields):
            sizes += _sizes(array.field(index))
        return sizes
    if types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return VALUE + _sizes(values).reshape(len(array), kind.list_size).sum(1)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        offsets = array.offsets.to_numpy()
        length = offsets[-1] - offsets[0]
        children = [array.keys, array.items] if types.is_map(kind) else [array.values]
        inner = np.zeros(length + 1, np.int64)
        for child in children:
            inner[1:] += _sizes(child.slice(offsets[0], length))
        return VALUE + np.diff(np.cumsum(inner)[offsets - offsets[0]])
    try:
        lengths = pyarrow.compute.binary_length(array.cast(_without_views(kind)))
    except pyarrow.ArrowNotImplementedError:  # a number, a date
        return np.full(len(array), VALUE)
    return VALUE + lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
