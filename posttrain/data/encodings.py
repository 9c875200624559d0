"""Text in other encodings than UTF-8: a byte order mark is believed, anything else is asked for, never guessed."""

import codecs
import io

from posttrain.errors import UserError

CHUNK = 1 << 20  # bytes that are decoded at once
UTF8 = ("utf-8", "utf-8-sig")
# A file's first bytes -> its encoding; the mark of UTF-32 begins as that of UTF-16.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# What programs still write: Excel and others on Windows in the West, in Cyrillic, in Japan and in China.
LIKELY = ("cp1252", "cp1251", "cp932", "gb18030")
# Encodings of Python's that no program writes files in, among them some that take quadratic time.
UNUSABLE = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "oem", "utf_7"})
AROUND = 24  # bytes before and after the first one that is wrong, for an example


def check(name: str) -> None:
    """Refuse what is not the name of an encoding of text.

    Raises:
        UserError: naming some.
    """
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        codec = None
    plain = name.lower().replace("-", "_")
    if codec is None or plain in UNUSABLE or codec.name.replace("-", "_") in UNUSABLE or not codec._is_text_encoding:
        raise UserError(f"data.encoding={name}: not an encoding of text; usual ones are {', '.join(LIKELY)}, utf-16")


class NotUtf8(UserError):
    """A file holds text in another encoding, or none."""


def as_utf8(file: io.BufferedReader, encoding: str | None) -> io.BufferedReader:
    """A file as if it were in UTF-8.

    Args:
        file: at its beginning.
        encoding: of it; None: what its byte order mark says, UTF-8 where it has none.
    """
    if encoding is None:
        encoding = marked(file) or "utf-8"
    if codecs.lookup(encoding).name in UTF8:
        return file
    return io.BufferedReader(_Recoded(file, encoding), CHUNK)


def marked(file: io.BufferedReader) -> str | None:
    """The encoding that the byte order mark at a file's beginning says; None: it has none, or that of UTF-8."""
    start = file.peek(4)[:4]
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), None)


class _Recoded(io.RawIOBase):
    """The bytes of a file, recoded to UTF-8.

    Raises:
        UnicodeDecodeError: when reading what is not in that encoding.
    """

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder(encoding)().decode
        self._rest = b""  # recoded and not yet read
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest and not self._ended:
            raw = self._file.read(CHUNK)
            self._ended = not raw
            self._rest = self._decode(raw, final=self._ended).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def not_utf8(raw: bytes, at: int) -> str:
    """What to say of bytes that are not UTF-8, of which the one at `at` is the first that is wrong."""
    byte = f"byte 0x{raw[at]:02x} is not UTF-8"
    if b"\0" in raw:
        return f"{byte}: this is a binary file"
    start = at
    while start > max(0, at - AROUND) and raw[start - 1 : start].isalnum():
        start -= 1
    end = at + 1
    while end < min(len(raw), at + AROUND) and (raw[end] >= 128 or raw[end : end + 1].isalnum()):
        end += 1
    readings = []
    for name in LIKELY:
        try:
            text = raw[start:end].decode(name)
        except UnicodeDecodeError:
            continue
        if text.isprintable():
            readings.append(f"data.encoding={name} reads it as {text!r}")
    if not readings:
        return f"{byte}: this is a binary file, or text in another encoding, which data.encoding names"
    return f"{byte}: this is text in another encoding: {', '.join(readings)}"
