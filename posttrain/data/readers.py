"""Rows of a file, one at a time: JSON, JSON Lines, CSV, Parquet, .xlsx, plain or compressed with gzip or Zstandard.

Nothing is read whole: a file may be larger than the memory.
"""

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, Protocol, cast

from posttrain.data import encodings, json_array, tables
from posttrain.data.conversation import RowError
from posttrain.data.json_array import JSONArray, NotAnArray
from posttrain.data.json_text import ROWS, RepeatedKey
from posttrain.errors import UserError

# Bytes of one row. A file without line ends (binary, or one huge JSON value) stops here instead of filling the memory.
MAX_ROW = 64 << 20
HUB = "hf://"  # what the name of a data set of the Hugging Face hub starts with
LINE = "line"  # the column of a text file's rows
# How an object begins that is no row: {"column": {"0": ..., as pandas writes it, and {"data": [{..., around all rows.
PANDAS_COLUMNS = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{\s*"0"\s*:')
# Messages in the list are a row's own.
AROUND_ROWS = re.compile(r'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{(?![^{}]*"(?:role|from)"\s*:)')
ARRAY_OF_ROWS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HEAD = 4096  # bytes that show what a file is
AROUND = frozenset({"data", "rows", "records", "examples", "samples", "items", "train"})  # names of all rows


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: its file, its index there from 0, how to name it to a person; its category, if asked for."""

    file: str
    row: int
    name: str
    category: str | None = None

    def __str__(self):
        return f"{self.file}, {self.name}"

    def digest(self) -> int:
        """64 bits that are equal for the same row alone."""
        digest = hashlib.blake2b(f"{self.file} {self.row}".encode("utf-8", "surrogateescape"), digest_size=8)
        return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True)
class FileOptions:
    """What a file doesn't say of itself; None: as it looks.

    Attributes:
        encoding: of its text.
        delimiter: between the columns of a CSV file.
        sheet: the name of a spreadsheet's sheet.
    """

    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None


class Lines(Protocol):
    """A file that is read line by line."""

    def readline(self, limit: int, /) -> bytes:
        """A line, cut off after `limit` bytes; nothing at the end."""
        ...


Row = tuple[Place, dict[str, Any] | RowError]
PLAIN = FileOptions()


def read(path: Path, kinds: Collection[str] | None = None, options: FileOptions = PLAIN) -> Iterator[Row]:
    """Yield the rows of one file, a broken row as its `RowError`.

    Args:
        path: of the file.
        kinds: suffixes that may be read; None: those of rows with columns.
        options: what the file doesn't say of itself.

    Raises:
        UserError: the file as a whole can't be read: unknown kind, empty, binary, damaged.
    """
    kind, packed = _kind(path)
    if packed and kind in _WHOLE:
        raise UserError(f"data.path: {path}: {kind} files are compressed by themselves; unpack it first")
    kinds = KNOWN if kinds is None else kinds
    if kind in ELSEWHERE:
        raise UserError(f"data.path: {path}: {ELSEWHERE[kind]}")
    if not path.name.lower().endswith(tuple(kinds)):
        raise UserError(f"data.path: {path}: unknown kind of file; known are {', '.join(sorted(kinds))}")
    count = 0
    try:
        _refuse_other_content(path, kind)
        rows = _WHOLE[kind](path, options) if kind in _WHOLE else _text_rows(kind, path, packed, options)
        for row in rows:
            count += 1
            yield row
    except OSError as error:
        raise UserError(f"data.path: {path}: can't be read: {error.strerror or error}") from None
    except EOFError:
        raise UserError(f"data.path: {path}: the compressed file ends too early; it is damaged") from None
    if not count:
        raise UserError(f"data.path: {path}: there are no rows in it")


def detected(path: Path, options: FileOptions) -> list[str]:
    """What the beginning of a file says of itself and nothing else does, with the key that would.

    That is an encoding other than UTF-8, and what separates the columns of a CSV file other than its kind's usual. Of a
    file that can't be read it is nothing: `read` says why.
    """
    kind, packed = _kind(path)
    if kind not in _READERS:
        return []
    found = []
    try:
        with _unpacked(path, packed) as file:
            encoding = encodings.marked(file)
            if encoding and options.encoding is None:
                found.append(f"text in {encoding} (data.encoding)")
            if kind in USUAL_DELIMITERS and options.delimiter is None:
                text = encodings.as_utf8(file, options.encoding)
                lines = (_text(raw, path, "") for raw in _physical_lines(text))
                delimiter, first, _ = tables.dialect(lines)
                if delimiter != USUAL_DELIMITERS[kind] and delimiter in first:
                    found.append(f"columns separated by {tables.name_of(delimiter)} (data.delimiter)")
    except (OSError, EOFError, UnicodeDecodeError, UserError):
        return []
    return found


def _kind(path: Path) -> tuple[str, str | None]:
    """The suffix of a file's content, and that of what it is compressed with."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = None
    if suffixes and suffixes[-1] in COMPRESSED:
        packed = suffixes.pop()
    return suffixes[-1] if suffixes else "", packed


def _refuse_other_content(path: Path, kind: str) -> None:
    """Refuse a file without content, and what is downloaded in a file's place.

    Raises:
        UserError: what it is.
    """
    with path.open("rb") as file:
        head = file.read(HEAD).lstrip().lower()
    if not path.stat().st_size:
        raise UserError(f"data.path: {path}: the file is empty")
    if head.startswith(LFS_POINTER):
        raise UserError(f"data.path: {path}: a pointer of Git LFS, not the file itself: `git lfs pull` fetches it")
    if head.startswith((b"<!doctype html", b"<html")) and kind != ".txt":
        raise UserError(f"data.path: {path}: a web page, as a download writes it that needs a login or has failed")


def _text_rows(kind: str, path: Path, packed: str | None, options: FileOptions) -> Iterator[Row]:
    try:
        with _unpacked(path, packed) as file:
            yield from _READERS[kind](encodings.as_utf8(file, options.encoding), path, options)
    except UnicodeDecodeError as error:
        name = options.encoding or "UTF-16, as its first bytes say"
        raise UserError(f"data.path: {path}: byte 0x{error.object[error.start]:02x} is not {name}") from None


@contextmanager
def _unpacked(path: Path, packed: str | None) -> Iterator[io.BufferedReader]:
    with path.open("rb", buffering=0) as file:
        if packed is None:
            yield _buffered(file)
        elif packed == ".gz":
            with gzip.GzipFile(fileobj=_buffered(file)) as unpacked:
                yield _buffered(unpacked)
        else:
            import pyarrow

            try:
                with pyarrow.CompressedInputStream(file, "zstd") as stream:
                    yield _buffered(stream)
            except OSError as error:
                if error.errno is not None:  # of the disk, not of the content
                    raise
                raise UserError(f"data.path: {path}: not a whole Zstandard file: {error}") from None


def _buffered(stream: object) -> io.BufferedReader:
    """`peek` and `readline` over a stream that only reads."""
    return io.BufferedReader(cast(io.RawIOBase, stream), json_array.CHUNK)


def _text(raw: bytes, path: Path, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise encodings.NotUtf8(f"data.path: {path}, {name}: {encodings.not_utf8(raw, error.start)}") from None
    if "\0" in text:
        raise UserError(f"data.path: {path}, {name}: holds a zero byte: this is a binary file")
    return text


def _object(value: object) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return _damage(value, "") or value
    return RowError(f"expected an object with named fields, found {type(value).__name__}", "a row is not an object")


def _damage(value: object, path: str) -> RowError | None:
    """What is wrong with the first part of a row that lost something on its way here; None: nothing.

    An object has a key twice, or a text has one surrogate without the other, as JSON can write it.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return RowError(
                    f"field `{path}`: holds half of a character, which is no text; a program has cut a text within an "
                    "emoji",
                    "text with half of a character",
                )
    elif isinstance(value, dict):
        if isinstance(value, RepeatedKey):
            where = f"{path}." if path else ""
            return RowError(f"field `{where}{value.key}`: is there twice, one of them would be lost", "a key twice")
        for name, item in value.items():
            if type(item) is str and item.isascii():
                continue
            found = _damage(item, f"{path}.{name}" if path else name)
            if found is not None:
                return found
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found = _damage(item, f"{path}[{index}]")
            if found is not None:
                return found
    return None


def _physical_lines(file: Lines) -> Iterator[bytes]:
    """The lines of a file with their ends, those of old Macs (CR) too; one without an end in MAX_ROW bytes is cut."""
    rest = b""
    while raw := file.readline(MAX_ROW):
        if not rest and b"\r" not in raw:
            yield raw
            continue
        lines = (rest + raw).splitlines(keepends=True)
        rest = b""
        if len(lines[-1]) < MAX_ROW and not lines[-1].endswith((b"\n", b"\r")):
            rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def _jsonl(file: io.BufferedReader, path: Path, options: FileOptions) -> Iterator[Row]:
    """One object a line; or an array of them under the wrong name."""
    if ARRAY_OF_ROWS.match(file.peek(HEAD)[:HEAD]):
        yield from _array(file, path)
    else:
        yield from _object_lines(file, path)


def _object_lines(file: Lines, path: Path) -> Iterator[Row]:
    row = 0
    for line, raw in enumerate(_physical_lines(file), 1):
        name = f"line {line}"
        if len(raw) >= MAX_ROW:
            raise UserError(f"data.path: {path}, {name}: longer than {MAX_ROW >> 20} MiB: not JSON Lines?")
        text = _text(raw, path, name).strip()
        if not text:
            continue
        try:
            found = _object(ROWS.decode(text))
        except json.JSONDecodeError as error:
            found = RowError(f"not valid JSON: {error.msg} at column {error.colno}", "not valid JSON")
        except RecursionError:
            found = RowError("not valid JSON: nested too deeply", "not valid JSON")
        except ValueError as error:  # Infinity, or a number of thousands of digits
            found = RowError(f"not valid JSON: {error}", "not valid JSON")
        yield Place(str(path), row, name), found
        row += 1


def _json(file: io.BufferedReader, path: Path, options: FileOptions) -> Iterator[Row]:
    """An array of objects, taken apart as it is read; or JSON Lines under the wrong name."""
    head = file.peek(json_array.CHUNK)
    beginning = head
    if len(head) > HEAD:
        beginning = head[:HEAD].rsplit(b"\n", 1)[0]
    start = _text(beginning, path, "line 1").lstrip()
    if start.startswith("["):
        yield from _array(file, path)
        return
    if not start.startswith("{"):
        raise UserError(f"data.path: {path}: not JSON: begins with {start[:20]!r}; expected [ or {{")
    _refuse_wrapped(head.decode(errors="replace"), path)
    yield from _object_lines(file, path)


def _refuse_wrapped(head: str, path: Path) -> None:
    """Refuse an object that is no row: one around all rows, or pandas' columns.

    Args:
        head: the beginning of the file.
        path: of it.

    Raises:
        UserError: what is to be written instead.
    """
    if PANDAS_COLUMNS.match(head):
        raise UserError(
            f"data.path: {path}: columns of {{index: value}}, as pandas writes them by default; write rows with "
            'DataFrame.to_json(path, orient="records", lines=True)'
        )
    around = AROUND_ROWS.match(head)
    first_line = head.lstrip().partition("\n")[0]
    try:
        json.loads(first_line)
        whole = True
    except (ValueError, RecursionError):
        whole = not first_line.rstrip().endswith(("{", "[", ",")) and not (around and "\n" in around.group())
    single = not head.lstrip().partition("\n")[2].strip()
    if around and (not whole or (single and around[1] in AROUND)):
        raise UserError(
            f"data.path: {path}: an object over all rows; its key `{around[1]}` holds a list: write that list alone "
            "into the file, or one object a line"
        )
    if not whole:
        raise UserError(
            f"data.path: {path}: an object over several lines; expected a list of rows, [...], or one object a line"
        )


def _array(file: io.BufferedReader, path: Path) -> Iterator[Row]:
    try:
        for row, (value, line) in enumerate(JSONArray(file.read(json_array.CHUNK), file, MAX_ROW)):
            yield Place(str(path), row, f"row {row} (line {line})"), _object(value)
    except NotAnArray as error:
        raise UserError(f"data.path: {path}, line {error.line}: {error}") from None


def _csv(file: Lines, path: Path, options: FileOptions) -> Iterator[Row]:
    number = 0  # of the last line that was read, from 1
    read = 0  # bytes of the row that is being read: a text in quotation marks may have any number of lines

    def lines() -> Iterator[str]:
        nonlocal number, read
        for number, raw in enumerate(_physical_lines(file), 1):
            read += len(raw)
            if read >= MAX_ROW:
                raise UserError(f"data.path: {path}, line {number}: the row is longer than {MAX_ROW >> 20} MiB")
            yield _text(raw, path, f"line {number}")

    csv.field_size_limit(MAX_ROW)
    delimiter, first, rest = tables.dialect(lines())
    before = number - 1  # lines before the one that names the columns
    if options.delimiter is not None:
        delimiter = tables.NAMED.get(options.delimiter, options.delimiter)
    table = csv.reader(chain([first], rest), delimiter=delimiter, strict=True)
    started = 1 + before
    try:
        header = tables.Header(next(table, []), path)
        row = 0
        started = table.line_num + 1 + before
        read = 0
        for values in table:
            read = 0
            place = Place(str(path), row, f"line {started}")
            started = table.line_num + 1 + before
            if values:
                yield place, header.row(values)
                row += 1
    except csv.Error as error:
        raise tables.csv_error(error, path, table.line_num + before, started) from None


def _xlsx(path: Path, options: FileOptions) -> Iterator[Row]:
    header = None
    row = 0
    for number, cells in tables.sheet_rows(path, options.sheet):
        values = [cell for cell in cells if isinstance(cell, str)]
        broken = next((cell for cell in cells if isinstance(cell, RowError)), None)
        if header is None:
            header = tables.Header(values, path)
            continue
        place = Place(str(path), row, f"row {number}")
        yield place, broken or header.row(values)
        row += 1


def _parquet(path: Path, options: FileOptions) -> Iterator[Row]:
    import pyarrow

    from posttrain.data import parquet

    try:
        for row, values in enumerate(parquet.rows(path, MAX_ROW)):
            yield Place(str(path), row, f"row {row}"), values
    except KeyError as error:  # of Arrow, strict about maps
        raise UserError(f"data.path: {path}: a map has a key twice: {error}") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"data.path: {path}: not a Parquet file, or damaged: {error}") from None


def _lines(file: Lines, path: Path, options: FileOptions) -> Iterator[Row]:
    """The lines of a text file, each with its end; what a document is says the format."""
    for row, raw in enumerate(_physical_lines(file)):
        name = f"line {row + 1}"
        if len(raw) >= MAX_ROW:
            raise UserError(f"data.path: {path}, {name}: longer than {MAX_ROW >> 20} MiB")
        yield Place(str(path), row, name), {LINE: _text(raw, path, name)}


def is_text(file: str) -> bool:
    """Whether a file is plain text, read by lines."""
    return file.lower().endswith(tuple(TEXT))


# Suffix -> the reader of its text, from a file that is open, unpacked and in UTF-8.
_READERS: dict[str, Callable[[io.BufferedReader, Path, FileOptions], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _lines,
}
# Suffix -> the reader of a file that is no text.
_WHOLE: dict[str, Callable[[Path, FileOptions], Iterator[Row]]] = {".parquet": _parquet, ".xlsx": _xlsx}
# Suffix -> what to do with a file that others read.
ELSEWHERE = {
    ".arrow": "the cache of `datasets`; write what load_from_disk returns with to_parquet",
    ".zip": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
    ".bz2": "bzip2; unpack it, or pack it with gzip or Zstandard",
    ".xz": "xz; unpack it, or pack it with gzip or Zstandard",
    ".xls": "an old spreadsheet; save it as .xlsx, or as CSV",
    ".ods": "a spreadsheet of another kind; save it as .xlsx, or as CSV",
}
COMPRESSED = (".gz", ".zst")
USUAL_DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT = frozenset({".txt", *(f".txt{pack}" for pack in COMPRESSED)})
PACKED = frozenset(map("".join, product(_READERS, COMPRESSED)))
KNOWN = (frozenset(_READERS) | frozenset(_WHOLE) | PACKED) - TEXT  # of rows with columns
