"""Iterate over a JSON array with only one element and a chunk of the file in memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, Protocol

from posttrain.data.encodings import not_utf8
from posttrain.data.json_text import ROWS

CHUNK = 1 << 20
_SPACE = " \t\n\r"


class Readable(Protocol):
    """A file as far as it is needed here."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end."""
        ...


class NotAnArray(Exception):
    """The text is not a JSON array, and why.

    Attributes:
        line: where, from 1.
    """

    def __init__(self, reason: str, line: int):
        super().__init__(reason)
        self.line = line


class JSONArray:
    """Iterates over (element, line it begins on) of the array in `file`.

    Args:
        head: bytes already read from `file`.
        file: the rest.
        largest: characters of the largest element allowed; a larger one, or one never closed, is
            an error.

    Raises:
        NotAnArray: not valid JSON, not UTF-8, or cut off.
    """

    def __init__(self, head: bytes, file: Readable, largest: int):
        self._file = file
        self._largest = largest
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""  # of the file so far, without what was dropped
        self._position = 0  # of the next character in _text
        self._line = 1  # of the character at _counted
        self._counted = 0
        self._more = True
        self._add(head)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._next()
        self._position += 1  # the [
        count = 0
        while True:
            char = self._next()
            if not char:
                raise self._error("the file ends within the array; it is incomplete")
            if char == "]":
                break
            if count:
                if char != ",":
                    raise self._error(f"not valid JSON: expected , or ] after row {count - 1}")
                self._position += 1
                self._next()
            value, end = self._scan(count)
            line = self._here()
            self._position = end
            yield value, line
            count += 1
        self._position += 1
        if self._next():
            raise self._error("not valid JSON: there is more after the array")

    def _scan(self, count: int) -> tuple[Any, int]:
        """Return the element at _position and where it ends in _text.

        Args:
            count: elements before it, for messages.
        """
        scan = ROWS.raw_decode
        chunk = CHUNK
        while True:
            try:
                value, end = scan(self._text, self._position)
                if end < len(self._text) or not self._more:  # else a number may continue
                    return value, end
            except json.JSONDecodeError as error:
                if not self._more or len(self._text) - self._position > self._largest:
                    raise self._error(f"row {count}: not valid JSON: {error.msg}") from None
            except ValueError as error:  # Infinity, or a number of thousands of digits
                raise self._error(f"row {count}: not valid JSON: {error}") from None
            except RecursionError:
                raise self._error(f"row {count}: not valid JSON: nested too deeply") from None
            # Most likely cut off. Read twice as much each time.
            self._add(self._file.read(chunk))
            chunk *= 2

    def _error(self, reason: str) -> NotAnArray:
        return NotAnArray(reason, self._here())

    def _add(self, raw: bytes) -> None:
        self._here()
        self._text = self._text[self._position :]
        self._position = 0
        self._counted = 0
        self._more = bool(raw)
        try:
            self._text += self._decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise NotAnArray(not_utf8(error.object, error.start), self._line) from None

    def _next(self) -> str:
        """Move to the next character that is not white space and return it; '' at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._text) or not self._more:
                return self._text[self._position : self._position + 1]
            self._add(self._file.read(CHUNK))

    def _here(self) -> int:
        """The line of the current character."""
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line
