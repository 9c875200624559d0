"""Parquet files that take little space and make much of it: refused by name, in bounded memory."""

import itertools
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data import parquet
from posttrain.data.readers import MAX_ROW, read
from posttrain.errors import UserError

# Read so many rows in a process of its own, then print its peak and how it has ended.
READ = """
import itertools, resource, sys
from pathlib import Path
import pyarrow.parquet, posttrain.data.parquet
from posttrain.data.readers import read
from posttrain.errors import UserError
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
rows = 0
try:
    for _ in itertools.islice(read(Path(sys.argv[1])), 8):
        rows += 1
    print("read", rows)
except UserError as error:
    print(error)
print(peak() - before)
"""


def repeated(text, rows=2048):
    """A column with one text for all rows, which the file has once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


def write(tmp_path, column, **settings):
    file = tmp_path / "rows.parquet"
    settings = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False, **settings}
    pq.write_table(pa.table({"text": column}), file, **settings)
    return file


def read_alone(file):
    done = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    said, mebibytes = done.stdout.strip().rsplit("\n", 1)
    return said, float(mebibytes)


@pytest.mark.parametrize("nested", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_one_large_text_for_many_rows(nested, tmp_path):
    """Within a row's limit, a few rows at a time; beyond it, refused by name."""
    for size, expected in ((60 << 20, "read 8"), (MAX_ROW, "row 0: longer than 64 MiB")):
        column = repeated("a" * size)
        if nested:
            column = pa.ListArray.from_arrays(
                np.arange(2049, dtype=np.int32), pa.StructArray.from_arrays([column], ["content"])
            )
        file = write(tmp_path, column)
        assert file.stat().st_size < 100_000
        said, mebibytes = read_alone(file)
        assert expected in said and mebibytes < 700


def test_many_texts_in_one_row(tmp_path):
    """A row's limit is about everything in it."""
    column = pa.ListArray.from_arrays(np.array([0, 1, 2000], np.int32), repeated("a" * (1 << 20), 2000))
    rows = read(write(tmp_path, column))
    assert next(rows)[1] == {"text": ["a" * (1 << 20)]}
    with pytest.raises(UserError, match=r"rows\.parquet, row 1: longer than 64 MiB"):
        next(rows)


def test_texts_that_begin_like_the_one_before(tmp_path):
    """Encoded as differences, so that a file has the long beginning once."""
    column = pa.array(["a" * (20 << 20) + str(number) for number in range(8)])
    file = write(tmp_path, column, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    said, mebibytes = read_alone(file)
    assert said == "read 8" and mebibytes < 700


def test_lists_without_an_end(tmp_path, monkeypatch):
    """Millions of nulls take no space in a file."""
    monkeypatch.setattr(parquet, "MAX_VALUES", 1 << 20)
    column = pa.ListArray.from_arrays(np.array([0, 2 << 20], np.int32), pa.nulls(2 << 20, pa.string()))
    with pytest.raises(UserError, match=r"row group 0 has 2,097,152 values of text\.list\.element in .*without an end"):
        list(read(write(tmp_path, column)))


def test_a_large_row_group(tmp_path, monkeypatch):
    """By what the file's own footer says."""
    monkeypatch.setattr(parquet, "MAX_GROUP", 1 << 20)
    file = write(tmp_path, pa.array(["a" * 100_000 + str(number) for number in range(30)]), use_dictionary=False)
    with pytest.raises(UserError, match=r"row group 0 has .* bytes, more than 0 GiB; write the file with smaller"):
        list(read(file))


CONTENT = "".join(map(chr, range(32, 127)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dictionary": False},
        {"row_group_size": 70},
        {"dictionary_pagesize_limit": 1000},
        {"use_dictionary": False, "column_encoding": {"source": "DELTA_BYTE_ARRAY", "name": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"data_page_version": "2.0", "compression": "zstd", "store_schema": False},
    ],
)
@pytest.mark.parametrize("part", [parquet.PART, 200_000])
def test_rows_are_those_of_the_file(settings, part, tmp_path, monkeypatch):
    """Of every type, with nulls, however the file was written and however its batches are cut."""
    monkeypatch.setattr(parquet, "PART", part)
    turn = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    schema = pa.schema([
        ("messages", pa.list_(turn)), ("turns", pa.large_list(turn)), ("number", pa.int64()), ("source", pa.string()),
        ("name", pa.string()), ("raw", pa.binary()), ("pairs", pa.map_(pa.string(), pa.string())),
        ("triples", pa.list_(pa.list_(pa.int32(), 3))), ("texts", pa.list_(pa.string(), 2)),
        ("when", pa.timestamp("us")), ("flag", pa.bool_()), ("nothing", pa.null()),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
    ])  # fmt: skip
    rows = []
    for number in range(2100):
        messages = [{"role": "user", "content": CONTENT[turn:] + str(number)} for turn in range(number % 4)]
        rows.append({
            "messages": messages if number % 7 else None, "turns": messages, "number": number,
            "source": None if number % 5 == 0 else "source" * (number % 9), "name": f"é {number}", "raw": b"\0\xff",
            "pairs": [("a", str(number))], "triples": [[number] * 3], "texts": ["a", None] if number % 3 else None,
            "flag": bool(number % 2), "kind": "ab"[number % 2],
        })  # fmt: skip
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, tmp_path / "rows.parquet", **settings)
    found = list(read(tmp_path / "rows.parquet"))
    assert [row for _, row in found] == table.to_pylist(maps_as_pydicts="strict")
    assert [place.row for place, _ in itertools.islice(found, 5)] == [0, 1, 2, 3, 4]
