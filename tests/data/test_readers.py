"""Files are streamed, and what is wrong with one is said with file, line and what was expected."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import json_array, readers, sources
from posttrain.data.conversation import RowError
from posttrain.data.formats import Alpaca
from posttrain.errors import UserError

ROWS = [{"a": "x", "b": "é\r\n"}, {"a": "", "b": "🎉"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstd(raw):
    return pa.compress(raw, "zstd", asbytes=True)


def read(path):
    return list(readers.read(path))


@pytest.mark.parametrize("kind", ["json", "jsonl", "ndjson", "csv", "tsv", "parquet", "lines.json", "one.json"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_every_kind(tmp_path, kind, packed):
    path = tmp_path / f"data.{kind}{packed}"
    expected = ROWS
    if kind == "parquet":
        if packed:
            pytest.skip("Parquet compresses by itself")
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        text = {
            "json": json.dumps(ROWS, indent=2),
            "csv": 'a,b\nx,"é\r\n"\n"",🎉\n',
            "tsv": 'a\tb\nx\t"é\r\n"\n""\t🎉\n',
            "one.json": json.dumps(ROWS[0]),
        }.get(kind, LINES)
        expected = ROWS[:1] if kind == "one.json" else ROWS
        raw = text.encode()
        path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[packed](raw))
    found = read(path)
    assert [row for _, row in found] == expected
    assert [place.row for place, _ in found] == list(range(len(expected)))


def test_a_zstandard_file_that_was_cut_between_two_blocks(tmp_path):
    """As of a broken download: whole lines, and nothing after them that isn't JSON."""
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(LINES.encode())
        packed.flush()
        half = stream.tell()
        packed.write(LINES.encode())
    whole = stream.getvalue().to_pybytes()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole + zstd(LINES.encode()))  # several in a file are one, as of gzip
    assert [row for _, row in read(path)] == 3 * ROWS
    path.write_bytes(whole[:half])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: not a whole Zstandard file: Truncated"):
        read(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.integers() | st.none(), max_size=3)))
def test_an_array_read_in_small_pieces_is_the_array(tmp_path_factory, rows):
    if not rows:
        return
    path = tmp_path_factory.mktemp("array") / "data.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    before = json_array.CHUNK
    json_array.CHUNK = 7
    try:
        assert [row for _, row in read(path)] == rows
    finally:
        json_array.CHUNK = before


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.txt", b"x", "unknown kind of file"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16")[:-1], "is not UTF-16"),
        ("a.jsonl", b"\x7fELF\0\0\xff", "binary"),
        ("a.jsonl", b"\0\0\0", "binary"),
        ("a.json", b"\x89PNG\r\n", "is not UTF-8"),
        ("a.json", b"hello", "not JSON: begins with 'hello'"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "line 2: row 1: not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "ends within the array"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "expected , or ]"),
        ("a.json", b'[{"a": 1}] x', "more after the array"),
        ("a.json", b'[{"a": 1},]', "line 1: row 1: not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', "byte 0xe9 is not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "name the columns, each once"),
        ("a.json", b'{\n "data": [\n  {"a": 1}\n ]\n}', "its key `data` holds a list: write that list alone"),
        ("a.json", b'{"data": [{"a": 1}]}', "its key `data` holds a list: write that list alone"),
        ("a.json", b'{"version": 1,\n "data": [{"a": 1}]}', "an object over several lines; expected a list of rows"),
        ("a.json", b'{"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}}', r'pandas.*orient="records", lines=True'),
        ("a.json", b'{\n "messages": [\n  {"content": "a",\n "role": "user"}]\n}\n{}', "an object over several lines"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file"),
        ("a.zip", b"PK", "an archive; unpack it"),
        ("a.arrow", b"ARROW1", "the cache of `datasets`; write what load_from_disk returns with to_parquet"),
        ("a.jsonl.gz", b"not gzip", "can't be read"),
        ("a.jsonl.zst", b"not zstandard", "not a whole Zstandard file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "damaged"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "raw", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', "not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n{"a": 2}\n', "expected an object"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 2}\n', "nested too deeply"),
        ("a.json", b'[{"a": 1}, 7, {"a": 2}]', "expected an object"),
        ("a.csv", b"a\n1\n2,3\n2\n", "2 values, the first line names 1: a"),
        ("a.jsonl", b'{"a": 1}\n{"a": {"b": [{"c": "x", "c": "y"}]}}\n{"a": 2}\n', "field `a.b[0].c`: is there twice"),
        ("a.json", b'[{"a": 1}, {"a": "x", "a": "y"}, {"a": 2}]', "field `a`: is there twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": Infinity}\n{"a": 2}\n', "Infinity is not a value of JSON"),
    ],
)
def test_broken_rows_do_not_hide_the_others(tmp_path, name, raw, reason):
    path = tmp_path / name
    path.write_bytes(raw)
    first, broken, last = (row for _, row in read(path))
    assert str(first["a"]) == "1" and str(last["a"]) == "2"
    assert isinstance(broken, RowError) and reason in broken.reason


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends_of_every_system(tmp_path, end):
    """Rows and their lines are the same, and a text in quotation marks keeps its own."""
    table = tmp_path / "a.csv"
    table.write_bytes(end.join(["a,b", '1,"x', 'y"', "2,z", ""]).encode())
    assert [row for _, row in read(table)] == [{"a": "1", "b": f"x{end}y"}, {"a": "2", "b": "z"}]
    text = tmp_path / "a.txt"
    text.write_bytes(end.join(["x", "", "y"]).encode())
    assert [row for _, row in readers.read(text, readers.TEXT)] == [{"line": f"x{end}"}, {"line": end}, {"line": "y"}]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(end.join(['{"a": 1}', "", '{"a": 2}']).encode())
    assert [(place.name, row) for place, row in read(lines)] == [("line 1", {"a": 1}), ("line 3", {"a": 2})]


def test_nan_is_no_value(tmp_path):
    """pandas writes it for what is missing."""
    for name, text in (("a.jsonl", '{"a": NaN, "b": [NaN]}'), ("a.json", '[{"a": NaN, "b": [NaN]}]')):
        (tmp_path / name).write_text(text)
        assert [row for _, row in read(tmp_path / name)] == [{"a": None, "b": [None]}]
    pq.write_table(pa.table({"a": [float("nan"), 2.0]}), tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path / "a.parquet")] == [{"a": None}, {"a": 2.0}]


def test_maps_of_parquet_are_objects(tmp_path):
    kind = pa.map_(pa.string(), pa.int64())
    pq.write_table(pa.table({"a": pa.array([[("x", 1), ("y", 2)], []], kind)}), tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path / "a.parquet")] == [{"a": {"x": 1, "y": 2}}, {"a": {}}]
    pq.write_table(pa.table({"a": pa.array([[("x", 1), ("x", 2)]], kind)}), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="a map has a key twice"):
        read(tmp_path / "twice.parquet")


def test_columns_of_one_name(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns are called 'a'"):
        read(tmp_path / "a.parquet")


def test_tables_with_tabs_in_capitals(tmp_path):
    (tmp_path / "A.TSV").write_text("a\tb\nx, y\tz\n")
    assert [row for _, row in read(tmp_path / "A.TSV")] == [{"a": "x, y", "b": "z"}]


def test_lines_with_one_list_each_are_rows(tmp_path):
    """One such object is around all rows, several are rows."""
    (tmp_path / "a.json").write_text('{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n')
    assert [row for _, row in read(tmp_path / "a.json")] == [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}]


def test_descriptions_beside_a_data_set_are_no_rows(tmp_path):
    """As a clone from the hub and save_to_disk have them."""
    for name in ("dataset_infos.json", "state.json", "data-00000-of-00001.arrow"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"no .* file in this folder; \*.arrow is the cache of `datasets`"):
        sources.files(str(tmp_path), "data.path", tmp_path)
    (tmp_path / "train.jsonl").write_text("x")
    assert sources.files(str(tmp_path), "data.path", tmp_path) == [tmp_path / "train.jsonl"]


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 5000 + b'"}')
    with pytest.raises(UserError, match="line 1: longer than"):
        read(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_large_file_is_streamed(tmp_path, name):
    import tracemalloc

    row = {"a": "x" * 2000}
    lines = {"a.json": "[" + ",\n".join([json.dumps(row)] * 10_000) + "]", "a.csv": "a\n" + (row["a"] + "\n") * 10_000}
    raw = lines.get(name, (json.dumps(row) + "\n") * 10_000).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    tracemalloc.start()
    assert sum(1 for _ in readers.read(tmp_path / name)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(raw) / 3


def test_places_name_the_line_of_each_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n\n{"a":\n2}]')
    assert [place.name for place, _ in read(path)] == ["row 0 (line 2)", "row 1 (line 4)"]


def test_folders_globs_and_lists(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl", "in/c.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text("x")
    names = [file.name for file in sources.files(str(tmp_path), "data.path", tmp_path)]
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert [file.name for file in sources.files(f"{tmp_path}/*.jsonl", "data.path", tmp_path)] == ["a.jsonl", "b.jsonl"]
    both = [str(tmp_path / "b.jsonl"), str(tmp_path / "in")]
    assert [file.name for file in sources.files(both, "data.path", tmp_path)] == ["b.jsonl", "c.jsonl.gz"]


def test_hidden_files_and_other_splits_of_a_folder(tmp_path):
    """As the hub reads names; a file that is named by itself is taken."""
    for name in (".ipynb_checkpoints/train.jsonl", "train.jsonl", "test.jsonl", "data/validation-00000.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "latest.jsonl").write_text("x")
    found = sources.files(str(tmp_path), "data.path", tmp_path)
    assert [file.name for file in found] == ["latest.jsonl", "train.jsonl"]
    (note,) = sources.left_out(sources.Source(str(tmp_path), Alpaca()))
    assert "data/validation-00000.jsonl, test.jsonl" in note
    everything = sources.files(str(tmp_path), "data.validation_path", tmp_path)
    assert len(everything) == 4 and not sources.left_out(
        sources.Source(str(tmp_path), Alpaca(), "data.validation_path")
    )
    assert sources.files(str(tmp_path / "test.jsonl"), "data.path", tmp_path) == [tmp_path / "test.jsonl"]
    with pytest.raises(UserError, match=r"files of other splits alone: validation-00000.jsonl; name the files"):
        sources.files(str(tmp_path / "data"), "data.path", tmp_path)


def test_nothing_found(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .* file in this folder"):
        sources.files(str(tmp_path / "empty"), "data.path", tmp_path)
    with pytest.raises(UserError, match=r"data\.path=tatsu-lab/alpaca.*hf://tatsu-lab/alpaca"):
        sources.files("tatsu-lab/alpaca", "data.path", tmp_path)
