"""Files as people have them: tables of other programs, other encodings, formats that nobody named, rows chosen."""

import csv
import datetime
import gzip
import io
import json
import subprocess
import sys
import time
import zipfile

import openpyxl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from posttrain import preview  # noqa: F401  (its schema)
from posttrain.cli import command, data_format
from posttrain.data import TrainingData, detection, encodings, readers, row_filter, sources
from posttrain.data.conversation import RowError
from posttrain.data.formats import Messages, PromptCompletion, Text
from posttrain.data.prepare import Counts, encode_conversations
from posttrain.data.readers import FileOptions
from posttrain.data.rules import Rules
from posttrain.data.sources import Source
from posttrain.errors import UserError

ROWS = [
    {"prompt": "Wie groß?\nGenau.", "completion": "3,5; etwa", "score": "4"},
    {"prompt": 'sagt "ja"', "completion": "é", "score": "2"},
]


def read(path, **options):
    return [row for _, row in readers.read(path, options=FileOptions(**options))]


def written(path, rows=ROWS, encoding="utf-8", before="", **dialect):
    """A CSV file as Python's csv module writes it."""
    text = io.StringIO(newline="")
    text.write(before)
    table = csv.DictWriter(text, rows[0], **dialect)
    table.writeheader()
    table.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def test_tables_of_other_programs_are_read_as_they_were_written(tmp_path):
    """By csv's dialects, Excel's own ways, and old programs' encodings; each file has the same rows."""
    path = tmp_path / "a.csv"
    for delimiter in ",;\t|":
        assert read(written(path, delimiter=delimiter)) == ROWS
        assert read(written(path, delimiter=delimiter, quoting=csv.QUOTE_ALL, encoding="utf-8-sig")) == ROWS
    assert read(written(path, dialect="excel-tab", encoding="utf-16")) == ROWS  # Excel's "Unicode text"
    assert read(written(path, dialect="excel-tab", encoding="utf-32")) == ROWS
    assert read(written(path, delimiter=":"), delimiter=":") == ROWS
    assert read(written(path, delimiter="\t"), delimiter="tab") == ROWS
    assert read(written(path, delimiter=";", before="sep=;\n")) == ROWS
    assert read(written(path, before="\n\r\n")) == ROWS
    for encoding in ("cp1252", "mac_roman", "latin-1", "utf-8", "utf-16-le"):
        assert read(written(path, encoding=encoding), encoding=encoding) == ROWS
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(written(path, delimiter=";", encoding="cp1252").read_bytes()))
    assert read(packed, encoding="cp1252") == ROWS
    packed = tmp_path / "a.jsonl.zst"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    packed.write_bytes(pa.compress(lines.encode("utf-16"), "zstd", asbytes=True))
    assert read(packed) == ROWS
    (tmp_path / "array.jsonl").write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    assert read(tmp_path / "array.jsonl") == ROWS


def test_how_a_file_is_read_is_said_where_nothing_else_says_it(tmp_path):
    def noted(path, **options):
        source = Source(str(path), PromptCompletion(), options=FileOptions(**options))
        return sources.detected([path], source)

    path = tmp_path / "a.csv"
    assert noted(written(path)) == [] and noted(written(tmp_path / "a.tsv", delimiter="\t")) == []
    said = "a.csv: read as columns separated by ; (data.delimiter), as its beginning says"
    assert noted(written(path, delimiter=";")) == [said]
    assert noted(path, delimiter=";") == []
    both = "text in utf-16 (data.encoding) and columns separated by tab (data.delimiter)"
    assert noted(written(path, dialect="excel-tab", encoding="utf-16")) == [
        f"a.csv: read as {both}, as its beginning says"
    ]
    path.write_bytes(b"\xff\xfe\xff")  # which can't be read
    assert noted(path) == []
    (tmp_path / "a.jsonl").write_text("{}")
    assert noted(tmp_path / "a.jsonl") == []


def test_a_large_file_in_another_encoding_is_recoded_whole(tmp_path):
    """Across the borders of what is decoded at once, where a character's bytes lie on both sides."""
    rows = [{"prompt": f"質問{number}" * 50, "completion": "答え"} for number in range(5000)]
    path = written(tmp_path / "large.csv", rows, "utf-16")
    assert path.stat().st_size > 2 * encodings.CHUNK
    assert read(path) == rows
    assert read(written(path, rows, "cp932"), encoding="cp932") == rows


def test_a_spreadsheet_is_read_as_its_cells_would_be_written(tmp_path):
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["prompt", "completion", "n", "when", None])
    sheet.append(["a", "b\nß", 4.5, datetime.datetime(2024, 1, 2, 3)])
    sheet.append([None])
    sheet.append(["6 x 7?", 42, True, datetime.date(2024, 1, 2)])
    sheet.append(["", "x", "#N/A", None])
    book.create_sheet("empty")
    book.save(path)
    first, second, broken = read(path)
    assert first == {"prompt": "a", "completion": "b\nß", "n": "4.5", "when": "2024-01-02T03:00:00"}
    assert second == {"prompt": "6 x 7?", "completion": "42", "n": "TRUE", "when": "2024-01-02T00:00:00"}
    assert isinstance(broken, RowError) and "C5 is #N/A" in broken.reason
    assert [place.name for place, _ in readers.read(path)] == ["row 2", "row 4", "row 5"]
    book.create_sheet("my notes").append(["seen"])
    book.save(path)
    with pytest.raises(UserError, match=r"several sheets: Sheet, my notes; choose one: data\.sheet=Sheet"):
        read(path)
    assert len(read(path, sheet="Sheet")) == 3
    with pytest.raises(UserError, match=r"data\.sheet=x: .* has no such sheet; it has Sheet, empty, my notes"):
        read(path, sheet="x")


def test_a_spreadsheet_of_a_stranger_takes_no_more_than_it_has(tmp_path):
    """An entity that stands for ten others, nine deep; and cells at the far end of an empty sheet."""
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.append(["prompt"])
    book.active.append(["REPLACED"])
    book.save(path)
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "lol">{entities}]>'
    parts = {}
    with zipfile.ZipFile(path) as packed:
        for name in packed.namelist():
            parts[name] = packed.read(name)
    for name in ("xl/sharedStrings.xml", "xl/worksheets/sheet1.xml", "xl/workbook.xml"):
        with zipfile.ZipFile(path, "w") as packed:
            for other, content in parts.items():
                if other == name:
                    declaration, root = content.split(b"?>", 1) if content.startswith(b"<?xml") else (b"<?xml", content)
                    content = declaration + b"?>" + bomb.encode() + root.replace(b"REPLACED", b"&e9;")
                packed.writestr(other, content)
        started = time.monotonic()
        try:
            size = len(str(read(path)))
        except UserError:
            size = 0
        assert size < 1000 and time.monotonic() - started < 10


def test_openpyxl_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"uv sync --extra excel"):
        read(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", "a;b\nx;größer\n".encode("cp1252"), "line 2: byte 0xf6 .* data.encoding=cp1252 reads it as 'größer'"),
        ("a.json", '[{"a": "größer"}]'.encode("cp1252"), "data.encoding=cp1252 reads it as 'größer'"),
        ("a.csv", "a,b\n質問,答え\n".encode("cp932"), "data.encoding=cp932 reads it as '質問'"),
        ("a.csv", "a,b\nДя,x\n".encode("cp1251"), "data.encoding=cp1251 reads it as 'Дя'"),
        ("a.csv", b"a,b,b\n1,2,3\n", "each once; found .'a', 'b', 'b'."),
        ("a.csv", b'a,b\n"x,1\ny,2\n', "line 3: .* opened and not closed .the row begins on line 2"),
        ("a.csv", b'a,b\n"x"y,1\n', 'line 2: .* written twice, ""'),
        ("a.csv", b"a,b\n", "there are no rows"),
        ("a.csv", b"\n\n", "there are no rows"),
        ("a.csv", b"<!DOCTYPE html>\n<html></html>", "a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.xlsx", b"hello", "not an .xlsx file, damaged, or protected"),
        ("a.xls", b"\xd0\xcf\x11\xe0", "an old spreadsheet; save it as .xlsx"),
        ("a.xlsx.gz", b"x", "compressed by themselves"),
    ],
)
def test_what_is_said_of_a_file_that_cannot_be_read(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a;b;;\n1;2;;\n", [{"a": "1", "b": "2"}]),
        ("a,,b\n1,,2\n", [{"a": "1", "b": "2"}]),
        ("a, b\n1,2\n", [{"a": "1", "b": "2"}]),
        (",a\n0,1\n", [{"": "0", "a": "1"}]),  # pandas' index
        ("a,,b\n1,x,2\n", ["column 2 has no name in the first line, and holds 'x'"]),
        ("a;b;;\n1;2;;x\n", ["4 values, the first line names 2: a, b"]),
        ("a\nx, y\n", ["2 values, the first line names 1: a"]),
    ],
)
def test_columns_without_a_name(tmp_path, text, rows):
    """None is lost: what is under no name is refused, by its row, unless it is empty."""
    (tmp_path / "a.csv").write_text(text)
    for found, right in zip(read(tmp_path / "a.csv"), rows, strict=True):
        if isinstance(right, str):
            assert isinstance(found, RowError) and found.reason.startswith(right)
        else:
            assert found == right


@pytest.mark.parametrize("option", ["data.encoding=latin-one", "data.encoding=punycode", "data.encoding=base64"])
def test_encodings_that_are_none(option):
    with pytest.raises(UserError, match=f"{option}: not an encoding of text; usual ones are cp1252"):
        TrainingData(PromptCompletion(), path="x", encoding=option.partition("=")[2])


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FORMATS = [
    ({"instruction": "a", "input": "", "output": "b", "text": "all of it"}, "data=alpaca"),
    ({"instruction": "a", "instances": [{"input": "a", "output": "b"}]}, "data=alpaca"),
    ({"instruction": "a", "context": "", "response": "b", "category": "c"}, "data=dolly"),
    ({"prompt": "a", "completion": "b"}, "data=prompt_completion"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "data=prompt_completion"),
    ({"messages": CHAT, "prompt": "a"}, "data=messages"),
    ({"messages": json.dumps(CHAT)}, "data=messages"),
    ({"conversations": CHAT}, "data=messages data.format.column=conversations"),
    ({"conversations": GPT, "id": "x"}, "data=sharegpt"),
    ({"dialog turns": GPT}, "data=sharegpt data.format.column='dialog turns'"),
    ({"prompt": {"role": "prompter", "text": "a", "replies": []}}, "data=oasst"),
    ({"text": "a", "url": "x", "language_score": 0.9}, "objective=text"),
]


@pytest.mark.parametrize("nothing", [[], "", {}, None])
def test_an_empty_first_row_does_not_hide_the_format(tmp_path, nothing):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": value}) + "\n" for value in (nothing, CHAT)))
    assert detection.detect(str(path), FileOptions(), tmp_path).overrides == ("data=messages",)


def test_lists_that_pandas_wrote_into_csv(tmp_path):
    """In Python's notation, which is no JSON: not offered as plain text to train on."""
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "rows.csv"
    pandas.DataFrame([{"messages": CHAT}]).to_csv(path, index=False)
    with pytest.raises(UserError, match=r"`messages` holds messages in Python's notation.*to_json.path, orient="):
        detection.detect(str(path), FileOptions(), tmp_path)
    ((_, error),) = sources.rows(Source(str(path), Messages()), tmp_path)
    assert isinstance(error, RowError) and "field `messages`: messages in Python's notation" in error.reason


@pytest.mark.parametrize(("row", "overrides"), FORMATS)
def test_the_format_is_told_by_the_columns(tmp_path, row, overrides):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({name: None for name in row}) + "\n" + json.dumps(row) + "\n")
    assert " ".join(detection.detect(str(path), FileOptions(), tmp_path).overrides) == overrides
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert " ".join(detection.detect(str(tmp_path / "rows.parquet"), FileOptions(), tmp_path).overrides) == overrides


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"Question": "a", "Answer": "b", "n": "1"},
            "add: data=prompt_completion data.format.prompt=Question data.format.completion=Answer",
        ),
        ({"left": "a", "right": "b"}, "data.format.prompt=left data.format.completion=right"),
        ({"text": "a", "label": "b"}, "Where `text` asks and `label` answers, add: data=prompt_completion"),
        (
            {"data": {"question": "a", "answer": "b"}},
            "data=custom data.format.prompt=data.question data.format.answer=",
        ),
        ({"body": "a", "id": 1}, "add: objective=text data.format.column=body"),
        ({"a": "1", "b": "2", "c": "3"}, "columns a, b, c, of no known format. Where `a` asks and `b` answers"),
        (
            {"messages": CHAT, "instruction": "a", "output": "b"},
            r"several formats\. Add one of:\n  data=messages\n  data=al",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference pairs, for which there is no objective .*=chosen",
        ),
        (
            {"chosen": CHAT, "rejected": CHAT},
            r"add: data=messages data.format.column=chosen 'data.format.metadata=\[rej",
        ),
        ({"a": 1, "id": "x"}, "none of which holds text"),
        ({}, "its first rows have no columns"),
    ],
)
def test_columns_that_do_not_tell_it_get_what_to_type(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        detection.detect(str(path), FileOptions(), tmp_path)


def test_what_to_type_for_preferences_trains_the_chosen_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    form = PromptCompletion(completion="chosen", metadata=["rejected"])
    ((_, conversation),) = sources.rows(Source(str(path), form), tmp_path)
    assert [message.content for message in conversation.messages] == ["a", "b"] and not conversation.unread


def test_text_files_are_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert detection.detect(str(tmp_path), FileOptions(), tmp_path).overrides == ("objective=text",)
    rows = sources.rows(Source(str(tmp_path), Text()), tmp_path)
    assert [document.text for _, document in rows] == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")  # beside a README.txt
    assert detection.detect(str(tmp_path), FileOptions(), tmp_path).overrides == ("data=prompt_completion",)


def test_a_command_takes_the_format_of_its_file(tmp_path, capsys):
    """As if it had been typed, where nothing chooses one; the demo's trainer is left."""
    path = tmp_path / "rows.csv"
    written(path, delimiter=";", encoding="cp1252")
    words = [f"data.path={path}", "data.encoding=cp1252"]
    assert data_format.complete([*words, "--cfg", "job"], "config")[-1] == "data=prompt_completion"
    assert "prompt_completion, by prompt, completion (data=prompt_completion); another" in capsys.readouterr().err
    typed = command.compose([*words, "data=prompt_completion"])
    for name in ("config", "preview"):
        cfg = command.compose(words, name)
        assert cfg.data == typed.data and cfg.trainer == typed.trainer
    assert typed.trainer.max_steps is None
    for chosen in (["data=alpaca"], ["objective=text"], ["data=demo"]):
        assert data_format.complete([*words, *chosen], "config") == [*words, *chosen]
    assert data_format.complete(["peft.rank=8"], "config") == ["peft.rank=8"]
    with pytest.raises(UserError, match=r"rows.csv, line 2: byte 0xdf .* data.encoding=cp1252"):
        data_format.complete(words[:1], "config")


def test_a_ready_run_takes_the_format_of_the_file_that_it_is_given(tmp_path):
    path = written(tmp_path / "rows.csv")
    cfg = command.compose(["experiment=lora_qwen3_8b", f"data.path={path}"])
    assert cfg.data.format._target_.endswith("PromptCompletion") and cfg.data.validation_fraction == 0.02
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    words = ["experiment=lora_qwen3_8b", f"data.path={tmp_path / 'chats.jsonl'}"]
    assert data_format.choose(words, "config") == data_format.NOTHING


def test_a_sweep_over_files_takes_the_format_that_they_have(tmp_path):
    for name, row in (("a", ROWS[0]), ("b", ROWS[1]), ("c", {"messages": CHAT})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    same = ["--multirun", f"data.path={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "optimizer.lr=1e-4,2e-4"]
    assert data_format.complete(same, "config") == [*same, "data=prompt_completion"]
    with pytest.raises(UserError, match=r"of this sweep differ in their format: .*choose one with data="):
        data_format.complete(["--multirun", f"data.path={tmp_path}/a.jsonl,{tmp_path}/c.jsonl"], "config")


COMMANDS = """
import runpy, sys
for command, path in (arguments.split("=", 1) for arguments in sys.argv[1:]):
    sys.argv = ["x", f"data.path={path}"]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        heavy = sorted({"torch", "transformers", "megatron", "datasets"} & set(sys.modules))
        print(command, error.code, heavy, file=sys.stderr)
"""


def test_a_wrong_file_is_answered_before_anything_heavy_is_imported(tmp_path):
    """Columns that no format has, and a row of a format that isn't right."""
    columns, row = tmp_path / "qa.csv", tmp_path / "rows.jsonl"
    columns.write_text("question;answer\na;b\n")
    row.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    arguments = []
    for name in ("posttrain", "posttrain.preview", "posttrain.plan"):
        arguments += [f"{name}={columns}", f"{name}={row}"]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr.count("data=prompt_completion data.format.prompt=question data.format.completion=answer") == 3
    assert done.stderr.count("rows.jsonl, line 2: field `output` is missing") == 3
    assert done.stderr.count(" 2 []\n") == 6 and "Traceback" not in done.stderr, done.stderr


# Rows chosen.

TABLE = [
    {"lang": "en", "score": 4, "text": "a" * 10, "tags": ["x"], "meta": {"ok": True}, "two words": "p"},
    {"lang": "de", "score": 2, "text": "b" * 200, "tags": [], "meta": {"ok": False}, "two words": "q"},
    {"lang": "en", "score": 1.5, "text": "c", "tags": ["x", "y"], "meta": {"ok": True}, "two words": "r"},
]
FIELD = pc.field


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ('lang == "en"', FIELD("lang") == "en"),
        ("lang != 'en' || score > 3", (FIELD("lang") != "en") | (FIELD("score") > 3)),
        ("score >= 1.5 && score < 4", (FIELD("score") >= 1.5) & (FIELD("score") < 4)),
        ('lang in ["de", "fr"]', pc.field("lang").isin(["de", "fr"])),
        ("size(text) > 5", pc.utf8_length(FIELD("text")) > 5),
        ('text.startsWith("b")', pc.starts_with(FIELD("text"), "b")),
        ('text.matches("^[ac]+$")', pc.match_substring_regex(FIELD("text"), "^[ac]+$")),
        ("!meta.ok", ~pc.struct_field(FIELD("meta"), "ok")),
        ('row["two words"] == "p"', FIELD("two words") == "p"),
        ("size(tags) == 2", pc.list_value_length(FIELD("tags")) == 2),
        ("has(row.lang) && lang == 'de'", FIELD("lang") == "de"),
    ],
)
def test_an_expression_chooses_the_rows_that_arrow_chooses(expression, right):
    rows = [(readers.Place("a", index, str(index)), row) for index, row in enumerate(TABLE)]
    table = pa.table({name: pa.array([row[name] for row in TABLE]) for name in TABLE[0]})
    chosen = [row for _, row in row_filter.chosen(rows, expression) if not isinstance(row, RowError)]
    assert [row["text"] for row in chosen] == table.filter(right)["text"].to_pylist()


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lang = 'en'", "write == for ="),
        ("lang == 'en' and score > 3", "write && for and"),
        ("not lang == 'en'", "write ! for not"),
        ("lang ==", "an example: lang =="),
        ("__import__('os').system('x')", "what may be used are comparisons"),
        ("open('/etc/passwd') == ''", "what may be used are comparisons"),
        ("tags.exists(a, tags.exists(b, a == b))", "macros over lists"),
        ("tags.map(a, a) == tags", "neither . nor macros"),
        ("text + text == ''", "neither . nor macros"),
        ("(" * 600 + "true" + ")" * 600, "more than 1000 characters"),
        ("(" * 400 + "true" + ")" * 400, "data.where"),
    ],
)
def test_an_expression_that_is_none_or_might_not_end(expression, message):
    with pytest.raises(UserError, match=message):
        row_filter.compile_where(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "language == 'en'",
            "no column `language`; found lang, score, text, tags, meta, two words. Where some rows have it",
        ),
        ("score > '3'", "score is a number. double.x. is the number of a text"),
        ("score", "is '4', neither true nor false"),
        ("meta.sure", "no 'sure'; has"),
        ("score / 0 > 1", "division by zero"),
    ],
)
def test_an_expression_that_a_row_cannot_answer(expression, message):
    ((_, row),) = row_filter.chosen([(readers.Place("a", 0, "0"), TABLE[0])], expression)
    assert isinstance(row, RowError) and not isinstance(row, row_filter.LeftOut)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(row.reason)


def test_a_column_that_some_rows_have_is_asked_for_first():
    rows = [(readers.Place("a", 0, "0"), row) for row in ({"lang": "en"}, {"lang": "de"}, {"other": 1})]
    found = [row for _, row in row_filter.chosen(rows, 'has(row.lang) && lang == "en"')]
    assert found[0] == {"lang": "en"} and all(isinstance(row, row_filter.LeftOut) for row in found[1:])


def test_a_pattern_takes_linear_time():
    """Where a backtracking engine takes two to the power of the text's length."""
    started = time.monotonic()
    rows = [(readers.Place("a", 0, "0"), {"text": "a" * 100_000})]
    ((_, row),) = row_filter.chosen(rows, 'text.matches("^(a+)+b$")')
    assert isinstance(row, row_filter.LeftOut) and time.monotonic() - started < 5


def test_a_value_of_any_depth_is_no_danger():
    """The row of a stranger is handed to a library in Rust, whose stack has an end."""
    for depth in (50, 5_000, 50_000):
        value = "x"
        for _ in range(depth):
            value = [value]
        ((_, row),) = row_filter.chosen([(readers.Place("a", 0, "0"), {"a": value})], "size(a) == 1")
        assert isinstance(row, dict) == (depth == 50)


def test_rows_left_out_are_counted_beside_the_others(tmp_path):
    """And are no errors, also where those stop a run; a file of validation rows is filtered too."""
    path = tmp_path / "rows.jsonl"
    languages = ("de", "fr", "de")
    path.write_text("".join(json.dumps({"prompt": "a", "completion": "b", "lang": x}) + "\n" for x in languages))
    data = TrainingData(PromptCompletion(), path=str(path), validation_path=str(path), where="lang == 'en'")
    rules = Rules("assistant", 8, "truncate", "right", "error")
    for source in data.all_sources():
        counts = Counts()
        list(encode_conversations(sources.rows(source, tmp_path), None, None, rules, counts))
        assert counts.rows == 3 and counts.read == 0 and dict(counts.dropped) == {"data.where is false": 3}
        assert counts.examples["data.where is false"].startswith(f"{path}, line 1: ")
    data = TrainingData(PromptCompletion(), sources=[{"path": str(path), "where": "lang == 'fr'"}, {"path": str(path)}])
    assert [len(list(sources.rows(source, tmp_path))) for source in data.all_sources()] == [3, 3]
    kept = [row for _, row in sources.rows(data.all_sources()[0], tmp_path) if not isinstance(row, RowError)]
    assert len(kept) == 1


def test_encoding_and_columns_are_asked_for_at_once(tmp_path):
    """Two questions about one file are one error; a file whose columns tell its format has the first alone."""
    rows = b"%s;%s\nGr\xf6\xdfe?;Gro\xdf\n"
    (tmp_path / "a.csv").write_bytes(rows % (b"frage", b"antwort"))
    with pytest.raises(UserError, match=r"(?s)data.encoding=cp1252.*Besides, .*data.format.prompt=frage"):
        detection.detect(str(tmp_path / "a.csv"), readers.FileOptions(), tmp_path)
    (tmp_path / "b.csv").write_bytes(rows % (b"prompt", b"completion"))
    with pytest.raises(encodings.NotUtf8, match=r"data\.encoding=cp1252") as raised:
        detection.detect(str(tmp_path / "b.csv"), readers.FileOptions(), tmp_path)
    assert "Besides" not in str(raised.value)
