"""A JSON array taken apart while it is read: only the element at hand and a chunk of the file are in memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20
_SPACE = " \t\n\r"


class NotAnArray(Exception):
    """What is wrong with the text, and after how many elements. Carries the line, from 1."""

    def __init__(self, reason: str, line: int):
        super().__init__(reason)
        self.line = line


class JSONArray:
    """Iterates over (element, line it begins on) of the array in `file`.

    Args:
        head: bytes already read from `file`.
        file: the rest.
        largest: characters of the largest element taken; a larger one, or one never closed, is an error.

    Raises:
        NotAnArray: not valid JSON, not UTF-8, or cut off.
    """

    def __init__(self, head: bytes, file: BinaryIO, largest: int):
        self._file, self._largest = file, largest
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0  # what is left of the file so far, and how much of that has been used
        self._line, self._counted = 1, 0  # the line of the character at _counted
        self._more = True
        self._add(head)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._next()
        self._at += 1  # the [
        count, scan, wanted = 0, json.JSONDecoder().raw_decode, CHUNK
        while (char := self._next()) != "]":
            if not char:
                raise NotAnArray("the file ends within the array; it is incomplete", self._here())
            if count:
                if char != ",":
                    raise NotAnArray(f"not valid JSON: expected , or ] after row {count - 1}", self._here())
                self._at += 1
                self._next()
            while True:
                try:
                    value, end = scan(self._text, self._at)
                    if end < len(self._text) or not self._more:  # else a number might go on
                        break
                except json.JSONDecodeError as error:
                    if not self._more or len(self._text) - self._at > self._largest:
                        raise NotAnArray(f"row {count}: not valid JSON: {error.msg}", self._here()) from None
                except ValueError as error:  # a number of thousands of digits
                    raise NotAnArray(f"row {count}: not valid JSON: {error}", self._here()) from None
                except RecursionError:
                    raise NotAnArray(f"row {count}: not valid JSON: nested too deeply", self._here()) from None
                self._add(self._file.read(wanted))  # most likely cut off: read twice as much each time
                wanted *= 2
            line = self._here()
            self._at, wanted = end, CHUNK
            yield value, line
            count += 1
        self._at += 1
        if self._next():
            raise NotAnArray("not valid JSON: there is more after the array", self._here())

    def _add(self, raw: bytes) -> None:
        self._here()
        self._text, self._at, self._counted = self._text[self._at :], 0, 0
        self._more = bool(raw)
        try:
            self._text += self._decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise NotAnArray(f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8", self._line) from None

    def _next(self) -> str:
        """Move to the next character that is no space; '' at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more:
                return self._text[self._at : self._at + 1]
            self._add(self._file.read(CHUNK))

    def _here(self) -> int:
        """The line of the current character."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line
