"""The format of own files where nobody chose one: `data.path=FILE` alone, told by the columns of its first rows.

A format is taken where the columns are those of one format and of no other. Anything else is asked for, with what to
type: a wrong guess would train on something else.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.config.overrides import format_override
from posttrain.data import encodings, readers, sources
from posttrain.data.conversation import RowError
from posttrain.data.formats import Text
from posttrain.data.formats.chat import PYTHON_NOTATION, is_python_notation, is_text_of_messages
from posttrain.data.formats.fields import listed, parse_json
from posttrain.data.readers import FileOptions
from posttrain.data.sources import Source
from posttrain.data.trace import holds, is_metadata
from posttrain.errors import UserError

FIRST = 64  # rows that are looked at
# Names of columns, in small letters, that ask and that answer.
QUESTIONS = ("question", "prompt", "query", "instruction", "input", "user", "human", "problem", "request")
ANSWERS = ("answer", "completion", "response", "output", "reply", "assistant", "solution", "target", "summary", "label")
PREFERENCE = ("chosen", "rejected")


@dataclass(frozen=True)
class Match:
    """A format that has the columns of a file.

    Attributes:
        name: of the format.
        columns: that it is known by.
        overrides: that choose it.
    """

    name: str
    columns: tuple[str, ...]
    overrides: tuple[str, ...]


def detect(path: str | Sequence[str], options: FileOptions, cache_dir: Path) -> Match:
    """The format of a path's files.

    Args:
        path: as for posttrain.data.sources.Source.
        options: what the files don't say of themselves.
        cache_dir: root of the cache.

    Raises:
        UserError: a file can't be read; or its columns are those of several formats, or of none: with what to type.
    """
    try:
        return _detect(path, options, cache_dir)
    except encodings.NotUtf8 as error:
        any_bytes = replace(options, encoding="latin-1")  # wrong for letters beyond ASCII, good enough for columns
        try:
            _detect(path, any_bytes, cache_dir)
        except UserError as question:  # said at once, since it would be the next
            raise UserError(f"{error}. Besides, {question}") from None
        raise


def _detect(path: str | Sequence[str], options: FileOptions, cache_dir: Path) -> Match:
    """As `detect`; a file in another encoding than UTF-8 is refused before its columns are looked at."""
    source = Source(path, Text(), options=options)
    if isinstance(path, str) and source.on_hub:
        from posttrain.data import hub_datasets  # loads `huggingface_hub`

        hub_datasets.revision(path, source.key)  # answers in seconds where there is none
    else:
        rows_with_columns = [file for file in source.files(cache_dir) if not readers.is_text(file.name)]
        if not rows_with_columns:
            return Match("plain text", (".txt",), ("objective=text",))
        source = Source(str(rows_with_columns[0]), Text(), options=options)
    first = list(islice(sources.raw_rows(source, cache_dir), FIRST))
    rows = [row for _, row in first if not isinstance(row, RowError)]
    if not rows:
        place, error = first[0]
        assert isinstance(error, RowError)
        raise UserError(f"{place}: {error.reason}")
    columns = _columns(rows)
    matches = list(_matches(columns))
    if len(matches) == 1 and not set(PREFERENCE) <= set(columns):
        return matches[0]
    raise UserError(f"data.path={_shown(path)}: {_question(columns, matches)}")


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each column of some rows with its first value that has something in it."""
    columns: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if not holds(columns.get(name)):
                columns[name] = value
    return columns


def _matches(columns: Mapping[str, Any]) -> Iterator[Match]:
    """Every format that has these columns; plain text where no other has."""
    found = list(_of_chat(columns))
    if "instruction" in columns and ("output" in columns or isinstance(columns.get("instances"), list)):
        names = _present(columns, "instruction", "input", "output", "instances")
        found.append(Match("alpaca", names, ("data=alpaca",)))
    if "instruction" in columns and "response" in columns:
        names = _present(columns, "instruction", "context", "response")
        found.append(Match("dolly", names, ("data=dolly",)))
    if "prompt" in columns and "completion" in columns:
        found.append(Match("prompt_completion", ("prompt", "completion"), ("data=prompt_completion",)))
    if isinstance(columns.get("prompt"), dict) and "replies" in columns["prompt"]:
        found.append(Match("oasst", ("prompt",), ("data=oasst",)))
    if {"message_id", "parent_id", "role", "text"} <= set(columns):
        found.append(Match("oasst", ("message_id", "parent_id", "role", "text"), ("data=oasst",)))
    if not found and isinstance(columns.get("text"), str) and not any(map(_said, columns)):
        found.append(Match("plain text", ("text",), ("objective=text",)))
    yield from found


def _present(columns: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """Of some columns those that there are."""
    return tuple(name for name in names if name in columns)


def _of_chat(columns: Mapping[str, Any]) -> Iterator[Match]:
    """The formats of columns that are lists of messages, but for those of preferences and of prompt and completion."""
    for name, value in columns.items():
        keys = _message_keys(value, name)
        if name in (*PREFERENCE, "prompt", "completion"):
            continue
        for form, wanted, column in (("messages", "role", "messages"), ("sharegpt", "from", "conversations")):
            if wanted in keys:
                mapping = () if name == column else (format_override("data.format.column", name),)
                yield Match(form, (name,), (f"data={form}", *mapping))


def _message_keys(value: object, name: str) -> set[str]:
    """The keys of a column's first message; empty where it has none."""
    if is_text_of_messages(value):
        try:
            value = parse_json(str(value), name)
        except RowError:
            return set()
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set(value[0])
    return set()


def _said(name: str) -> bool:
    return _last(name) in (*QUESTIONS, *ANSWERS)


def _last(name: str) -> str:
    """The last part of a path to a value, in small letters."""
    return name.rpartition(".")[2].lower()


def _paths(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns, and those within columns as `data=custom` names them, with their values."""
    for name, value in columns.items():
        if isinstance(value, dict):
            for inner, part in value.items():
                yield f"{name}.{inner}", part
        else:
            yield name, value


def _question(columns: Mapping[str, Any], matches: Sequence[Match]) -> str:
    """What to ask about columns that don't say which format they are of, with what to add to the command."""
    if not columns:
        return "its first rows have no columns"
    named = f"has the columns {listed(columns)}"
    if set(PREFERENCE) <= set(columns):
        overrides = ["data=prompt_completion", "data.format.completion=chosen", "data.format.metadata=[rejected]"]
        if _message_keys(columns["chosen"], "chosen"):
            overrides = ["data=messages", "data.format.column=chosen", "data.format.metadata=[rejected]"]
        return (
            f"{named}: preference pairs, for which there is no objective here yet (DPO and the like). To train on the "
            f"chosen answers, add: {shlex.join(overrides)}"
        )
    if matches:
        lines = [f"\n  {shlex.join(match.overrides)}" for match in matches]
        return f"{named}, which are those of several formats. Add one of:{''.join(lines)}"
    named += ", of no known format"
    for name, value in columns.items():
        if is_python_notation(value):
            return f"{named}: `{name}` holds {PYTHON_NOTATION}"
    texts, questions, answers = [], [], []
    for name, value in _paths(columns):
        if not isinstance(value, str) or is_metadata(name):
            continue
        texts.append(name)
        if _last(name) in QUESTIONS:
            questions.append(name)
        if _last(name) in ANSWERS:
            answers.append(name)
    if len(questions) == len(answers) == 1:
        texts = [*questions, *answers]
    if len(texts) > 1:
        question, answer = texts[:2]
        return f"{named}. Where `{question}` asks and `{answer}` answers, add: {_pair(question, answer)}"
    if texts:
        overrides = ["objective=text", format_override("data.format.column", texts[0])]
        return f"{named}. For continued pre-training on its text, add: {shlex.join(overrides)}"
    return f"{named}, none of which holds text; data=NAME says what they mean: docs/data.md"


def _pair(question: str, answer: str) -> str:
    """What maps two columns to a question and its answer."""
    form, last = "prompt_completion", "completion"
    if "." in question + answer:  # which only that format reads as a path
        form, last = "custom", "answer"
    overrides = [f"data={form}", format_override("data.format.prompt", question)]
    return shlex.join([*overrides, format_override(f"data.format.{last}", answer)])


def _shown(path: str | Sequence[str]) -> str:
    return path if isinstance(path, str) else f"[{','.join(path)}]"
