"""Plain text: documents in a column, or in text files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from posttrain.data import readers
from posttrain.data.conversation import Document, RowError
from posttrain.data.formats.fields import FormatOptions, text
from posttrain.data.readers import Place, Row
from posttrain.data.trace import TracedRow
from posttrain.errors import UserError

SPLITS = ("file", "paragraph", "line")


@dataclass
class Text(FormatOptions):
    """Documents, for `objective=text`.

    Attributes:
        column: of rows that have several, the one with the text.
        split: what a document of a `.txt` file is: the whole file, a paragraph (up to a blank line) or a line.
    """

    column: str = "text"
    split: str = "file"
    kinds: ClassVar[frozenset[str]] = readers.KNOWN | readers.TEXT

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"data.format.split={self.split}: must be one of {', '.join(SPLITS)}")

    def documents(self, row: dict[str, str]) -> Iterator[Document]:
        """The document of a row."""
        yield Document(text(row, self.column, option="column"))

    def read(self, rows: Iterable[Row]) -> Iterator[tuple[Place, Document | RowError]]:
        """Documents of rows; the lines of text files are put together."""
        lines: list[tuple[Place, str]] = []
        size = 0
        for place, row in rows:
            if lines and place.file != lines[0][0].file:
                yield join(lines)
                lines = []
                size = 0
            if isinstance(row, RowError):
                yield place, row
                continue
            if not readers.is_text(place.file):
                yield self._document(place, row)
                continue
            line = row[readers.LINE]
            size += len(line)
            if size > readers.MAX_ROW:
                limit = f"{readers.MAX_ROW >> 20} MiB"
                raise UserError(
                    f"{place}: a document of more than {limit}; data.format.split=paragraph or line makes shorter ones"
                )
            lines.append((place, line))
            if self.split == "line" or (self.split == "paragraph" and not line.strip()):
                yield join(lines)
                lines = []
                size = 0
        if lines:
            yield join(lines)

    def _document(self, place: Place, row: dict[str, str]) -> tuple[Place, Document | RowError]:
        traced = TracedRow(row)
        try:
            document = next(self.documents(traced))
            document.unread = traced.unread(self.metadata)
            return place, document
        except RowError as error:
            return place, error


def join(lines: list[tuple[Place, str]]) -> tuple[Place, Document]:
    """The document of some lines, without the line ends around it."""
    return lines[0][0], Document("".join(line for _, line in lines).strip("\r\n"))
