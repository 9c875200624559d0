"""Tables of texts: the dialect of a CSV file, the columns that a first line names, the cells of a spreadsheet."""

import csv
import datetime
import re
import shlex
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain, dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.overrides import format_override
from posttrain.data.conversation import RowError
from posttrain.errors import UserError

if TYPE_CHECKING:
    from openpyxl.cell.cell import Cell
    from openpyxl.worksheet.worksheet import Worksheet

DELIMITERS = (",", ";", "\t", "|")  # by preference, where a first line has several equally often
NAMED = {"tab": "\t", "\\t": "\t"}  # what can be typed for it
# What Excel writes as the first line, and reads, where a list separator is not the country's own.
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
MAX_UNPACKED = 1 << 30  # bytes of a spreadsheet's parts


def check_delimiter(delimiter: str) -> None:
    """Refuse what can't separate columns.

    Raises:
        UserError: it is not one character, or one that CSV has for something else.
    """
    if delimiter not in NAMED and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        raise UserError(f"data.delimiter={delimiter}: must be one character, or tab")


def delimiter_of(line: str) -> str:
    """What separates the columns of a first line: the one that is there most often, outside of quotation marks."""
    plain = re.sub(r'"[^"]*("|$)', "", line)
    return max(DELIMITERS, key=plain.count)


def dialect(lines: Iterator[str]) -> tuple[str, str, Iterator[str]]:
    """What separates the columns of a table, the line that names them, and the lines behind it.

    Empty lines on top are none of the table; nor is a first one that says the separator.
    """
    rest = dropwhile(lambda line: not line.strip(), lines)
    first = next(rest, "")
    separator = SEPARATOR_LINE.fullmatch(first)
    if separator:
        return separator[1], next(rest, ""), rest
    return delimiter_of(first), first, rest


def name_of(delimiter: str) -> str:
    """A delimiter as it is typed."""
    return "tab" if delimiter == "\t" else delimiter


class Header:
    """The columns that a table's first line names.

    Columns without a name at the end are none: spreadsheets write them for cells that were once used.

    Args:
        names: of the first line.
        place: the file, for errors.

    Raises:
        UserError: a name is there twice.
    """

    def __init__(self, names: Sequence[str], place: Path) -> None:
        self.names = list(map(str.strip, names))
        while self.names and not self.names[-1]:
            self.names.pop()
        named = list(filter(None, self.names))
        if len(set(named)) != len(named):
            raise UserError(
                f"data.path: {place}: the first line must name the columns, each once; found {str(list(names))[:300]}"
            )

    def row(self, values: Sequence[str]) -> dict[str, Any] | RowError:
        """The row of some values; a column without a name is pandas' index, or empty."""
        count = len(self.names)
        if len(values) < count or any(map(str.strip, values[count:])):
            columns = ", ".join(self.names)[:300]
            return RowError(
                f"{len(values)} values, the first line names {count}: {columns} (in CSV a text that has the delimiter "
                "in it stands in quotation marks)",
                "a line with too few or too many values",
            )
        row = {}
        for index, (name, value) in enumerate(zip(self.names, values, strict=False)):
            if name or index == 0:
                row[name] = value
            elif value.strip():
                return RowError(
                    f"column {index + 1} has no name in the first line, and holds {value[:40]!r}",
                    "a value in a column without a name",
                )
        return row


def csv_error(error: csv.Error, path: Path, line: int, started: int) -> UserError:
    """The error of a CSV file that can't be taken apart.

    Args:
        error: Python's.
        path: of the file.
        line: where it was noticed.
        started: the line on which the row begins.
    """
    reason = str(error)
    if "unexpected end" in reason:
        reason = "the file ends within quotation marks, which are opened and not closed"
    elif "expected after" in reason:
        reason = (
            'after a closing quotation mark there is more text; a quotation mark within a text is written twice, ""'
        )
    return UserError(f"data.path: {path}, line {line}: not valid CSV: {reason} (the row begins on line {started})")


def sheet_rows(path: Path, name: str | None) -> Iterator[tuple[int, list[str | RowError]]]:
    """Yield (number from 1, cells as texts) of a spreadsheet's rows that aren't blank; an error value is a RowError.

    Args:
        path: an .xlsx file.
        name: of the sheet; None: the only one that has something in it.

    Raises:
        UserError: openpyxl is not installed, the file is damaged, or there is not one sheet to read.
    """
    try:
        import openpyxl  # of an extra
    except ModuleNotFoundError:
        raise UserError(
            f"data.path: {path}: a spreadsheet, which openpyxl reads; it is not installed: run "
            "`uv sync --extra excel`, or save the file as CSV"
        ) from None
    from openpyxl.utils.exceptions import InvalidFileException

    warnings.filterwarnings("ignore", module="openpyxl")  # about what is no value: styles, validation of cells
    try:
        with zipfile.ZipFile(path) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size > MAX_UNPACKED:
            raise UserError(f"data.path: {path}: has {size:,} bytes when unpacked, more than {MAX_UNPACKED >> 30} GiB")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        try:
            for number, cells in enumerate(_sheet(book.worksheets, name, path).iter_rows(), 1):
                values = list(map(_text, cells))
                if any(values):
                    yield number, values
        finally:
            book.close()
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError, SyntaxError) as error:
        raise UserError(f"data.path: {path}: not an .xlsx file, damaged, or protected by a password: {error}") from None


def _sheet(sheets: "Sequence[Worksheet]", name: str | None, path: Path) -> "Worksheet":
    """The sheet of this name, or the only visible one with a value."""
    if name is not None:
        for sheet in sheets:
            if sheet.title == name:
                return sheet
        raise UserError(f"data.sheet={name}: {path} has no such sheet; it has {_titles(sheets)}")
    filled = [sheet for sheet in sheets if sheet.sheet_state == "visible" and _holds_values(sheet)]
    if not filled:
        raise UserError(f"data.path: {path}: there are no rows in it")
    if len(filled) > 1:
        choice = shlex.quote(format_override("data.sheet", filled[0].title))
        raise UserError(f"data.path: {path}: has several sheets: {_titles(filled)}; choose one: {choice}")
    return filled[0]


def _titles(sheets: "Sequence[Worksheet]") -> str:
    return ", ".join(sheet.title for sheet in sheets)


def _holds_values(sheet: "Worksheet") -> bool:
    values = chain.from_iterable(sheet.iter_rows(values_only=True))
    return any(value is not None for value in values)


def _text(cell: "Cell") -> str | RowError:
    """A cell's value as CSV would have it."""
    value = cell.value
    if value is None:
        return ""
    if cell.data_type == "e":
        return RowError(f"cell {cell.coordinate} is {value}, an error of its formula", "a formula's error")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
