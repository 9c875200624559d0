"""Rows of a file, one at a time: JSON, JSON Lines, CSV, Parquet, plain or compressed with gzip or Zstandard.

Nothing is read whole: a file may be larger than the memory.
"""

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.data import json_array
from posttrain.data.conversation import RowError
from posttrain.data.json_array import JSONArray, NotAnArray, Readable
from posttrain.data.json_text import ROWS, RepeatedKey
from posttrain.errors import UserError

if TYPE_CHECKING:
    import zstandard

# Bytes of one row. A file without line ends (binary, or one huge JSON value) stops here instead of filling the memory.
MAX_ROW = 64 << 20
HUB = "hf://"  # what the name of a data set of the Hugging Face hub starts with
LINE = "line"  # the column of a text file's rows
# How an object begins that is no row: {"column": {"0": ..., as pandas writes it, and {"data": [{..., around all rows.
PANDAS_COLUMNS = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{\s*"0"\s*:')
AROUND_ROWS = re.compile(r'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{')
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


class Lines(Protocol):
    """A file that is read line by line."""

    def readline(self, limit: int, /) -> bytes:
        """A line, cut off after `limit` bytes; nothing at the end."""
        ...


class Bytes(Lines, Readable, Protocol):
    """A file as readers need it."""


Row = tuple[Place, dict[str, Any] | RowError]


def read(path: Path, kinds: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the rows of one file, a broken row as its `RowError`.

    Args:
        path: of the file.
        kinds: suffixes that may be read; None: those of rows with columns.

    Raises:
        UserError: the file as a whole can't be read: unknown kind, empty, binary, damaged.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = None
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        packed = suffixes.pop()
    reader = _READERS.get(suffixes[-1] if suffixes else "")
    if packed and reader is _parquet:
        raise UserError(f"data.path: {path}: Parquet compresses by itself; unpack it first")
    kinds = KNOWN if kinds is None else kinds
    if suffixes and suffixes[-1] in ELSEWHERE:
        raise UserError(f"data.path: {path}: {ELSEWHERE[suffixes[-1]]}")
    if reader is None or not path.name.lower().endswith(tuple(kinds)):
        raise UserError(f"data.path: {path}: unknown kind of file; known are {', '.join(sorted(kinds))}")
    count = 0
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data.path: {path}: the file is empty")
        rows = reader(path) if reader is _parquet else _text_rows(reader, path, packed)
        for row in rows:
            count += 1
            yield row
    except OSError as error:
        raise UserError(f"data.path: {path}: can't be read: {error.strerror or error}") from None
    except EOFError:
        raise UserError(f"data.path: {path}: the compressed file ends too early; it is damaged") from None
    if not count:
        raise UserError(f"data.path: {path}: there are no rows in it")


def _text_rows(reader: Callable[[Bytes, Path], Iterator[Row]], path: Path, packed: str | None) -> Iterator[Row]:
    if packed == ".zst":
        import zstandard

        try:
            with (
                path.open("rb") as raw,
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as file,
            ):
                yield from reader(_Buffered(file), path)
        except zstandard.ZstdError as error:
            raise UserError(f"data.path: {path}: not a Zstandard file, or damaged: {error}") from None
    elif packed:
        with gzip.open(path, "rb") as unpacked:
            yield from reader(unpacked, path)
    else:
        with path.open("rb") as plain:
            yield from reader(plain, path)


class _Buffered:
    """`read` and `readline` over a stream that only reads."""

    def __init__(self, stream: "zstandard.ZstdDecompressionReader"):
        self._file = io.BufferedReader(stream, json_array.CHUNK)

    def read(self, size: int, /) -> bytes:
        return self._file.read(size)

    def readline(self, limit: int, /) -> bytes:
        return self._file.readline(limit)


def _text(raw: bytes, path: Path, name: str) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"data.path: {path}: is UTF-16 text; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        hint = "a binary file" if b"\0" in raw else "text in another encoding than UTF-8"
        raise UserError(f"data.path: {path}, {name}: byte 0x{byte:02x} is not UTF-8: this is {hint}") from None
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


def _jsonl(file: Lines, path: Path) -> Iterator[Row]:
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


def _json(file: Bytes, path: Path) -> Iterator[Row]:
    """An array of objects, taken apart as it is read; or JSON Lines under the wrong name."""
    head = file.read(json_array.CHUNK)
    beginning = head
    if len(head) > 4096:
        beginning = head[:4096].rsplit(b"\n", 1)[0]
    start = _text(beginning, path, "line 1").lstrip()
    if not start.startswith("["):
        if not start.startswith("{"):
            raise UserError(f"data.path: {path}: not JSON: begins with {start[:20]!r}; expected [ or {{")
        _refuse_wrapped(head.decode(errors="replace"), path)
        yield from _jsonl(_Prefixed(head, file), path)
        return
    yield from _array(head, file, path)


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


class _Prefixed:
    """`readline` over bytes already read and the stream behind them."""

    def __init__(self, head: bytes, stream: Lines):
        self._head, self._stream = head, stream

    def readline(self, limit: int) -> bytes:
        if not self._head:
            return self._stream.readline(limit)
        line, newline, self._head = self._head.partition(b"\n")
        if newline or self._head:
            return line + newline
        return line + self._stream.readline(limit)


def _array(head: bytes, file: Bytes, path: Path) -> Iterator[Row]:
    try:
        for row, (value, line) in enumerate(JSONArray(head, file, MAX_ROW)):
            yield Place(str(path), row, f"row {row} (line {line})"), _object(value)
    except NotAnArray as error:
        raise UserError(f"data.path: {path}, line {error.line}: {error}") from None


def _csv(file: Lines, path: Path) -> Iterator[Row]:
    read = 0  # bytes of the row that is being read: a text in quotation marks may have any number of lines

    def lines() -> Iterator[str]:
        nonlocal read
        for number, raw in enumerate(_physical_lines(file), 1):
            read += len(raw)
            if read >= MAX_ROW:
                raise UserError(f"data.path: {path}, line {number}: the row is longer than {MAX_ROW >> 20} MiB")
            yield _text(raw, path, f"line {number}")

    csv.field_size_limit(MAX_ROW)
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    table = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        names = next(table, [])
        if len(set(names)) != len(names):
            raise UserError(
                f"data.path: {path}: the first line must name the columns, each once; found {str(names)[:300]}"
            )
        row, line = 0, table.line_num + 1
        read = 0
        for values in table:
            read = 0
            place = Place(str(path), row, f"line {line}")
            line = table.line_num + 1
            if not values:
                continue
            if len(values) == len(names):
                yield place, dict(zip(names, values, strict=True))
            else:
                reason = f"{len(values)} values for the {len(names)} columns {', '.join(names)[:300]}"
                yield place, RowError(reason, "a line with too few or too many values")
            row += 1
    except csv.Error as error:
        raise UserError(f"data.path: {path}, line {table.line_num}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow

    from posttrain.data import parquet

    try:
        for row, values in enumerate(parquet.rows(path, MAX_ROW)):
            yield Place(str(path), row, f"row {row}"), values
    except KeyError as error:  # of Arrow, strict about maps
        raise UserError(f"data.path: {path}: a map has a key twice: {error}") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"data.path: {path}: not a Parquet file, or damaged: {error}") from None


def _lines(file: Bytes, path: Path) -> Iterator[Row]:
    """The lines of a text file, each with its end; what a document is says the format."""
    for row, raw in enumerate(_physical_lines(file)):
        name = f"line {row + 1}"
        if len(raw) >= MAX_ROW:
            raise UserError(f"data.path: {path}, {name}: longer than {MAX_ROW >> 20} MiB")
        yield Place(str(path), row, name), {LINE: _text(raw, path, name)}


def is_text(file: str) -> bool:
    """Whether a file is plain text, read by lines."""
    return file.lower().endswith(tuple(TEXT))


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _lines,
}
# Suffix -> what to do with a file that others read.
ELSEWHERE = {
    ".arrow": "the cache of `datasets`; write what load_from_disk returns with to_parquet",
    ".zip": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
    ".bz2": "bzip2; unpack it, or pack it with gzip or Zstandard",
    ".xz": "xz; unpack it, or pack it with gzip or Zstandard",
    ".xlsx": "a spreadsheet; save it as CSV in UTF-8",
}
# Suffix -> what to do with a file that others read.
ELSEWHERE = {
    ".arrow": "the cache of `datasets`; write what load_from_disk returns with to_parquet",
    ".zip": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
    ".bz2": "bzip2; unpack it, or pack it with gzip or Zstandard",
    ".xz": "xz; unpack it, or pack it with gzip or Zstandard",
    ".xlsx": "a spreadsheet; save it as CSV in UTF-8",
}
COMPRESSED = (".gz", ".zst")
TEXT = frozenset({".txt", *(f".txt{pack}" for pack in COMPRESSED)})
KNOWN = (
    frozenset(_READERS) | {f"{kind}{pack}" for kind in _READERS if kind != ".parquet" for pack in COMPRESSED}
) - TEXT  # of rows with columns
