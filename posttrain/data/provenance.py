"""A string that remembers which message its characters come from, through what chat templates do to strings.

A template is rendered with `TrackedStr` message texts. Concatenating, trimming, splitting, slicing and replacing keep
the marks at the right characters; every other operation returns a plain string, so that text which can no longer be
attributed is never attributed wrongly.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Where text comes from.

    Attributes:
        message: its index; TOOLS for the tool definitions, VARIABLES for the row's own variables of the template.
        field: the key of the message.
        path: keys and indices within the field, down to the text or to the container that was written as JSON.
    """

    message: int
    field: str
    path: tuple[str | int, ...] = ()


TOOLS = -1
VARIABLES = -2


# start and end in the marked string (characters), source, offset of `start` in the source's own text
Span = tuple[int, int, Source, int]


class TrackedStr(str):
    """A `str` with spans in ascending order. Equal to, and hashed like, the plain string."""

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: tuple[Span, ...] = ()):
        self = super().__new__(cls, text)
        self.spans = spans
        return self

    def __str__(self):
        return self  # `str(x)` is what Jinja wraps around every output

    def __add__(self, other):
        if type(other) is str:
            return TrackedStr(str.__add__(self, other), self.spans)
        if isinstance(other, str):
            return concat((self, other))
        return NotImplemented

    def __radd__(self, other):
        if type(other) is str:
            return TrackedStr(str.__add__(other, self), _moved(self.spans, len(other)))
        if isinstance(other, str):
            return concat((other, self))
        return NotImplemented

    def __getitem__(self, key):
        if not isinstance(key, slice):
            key = slice(key, key + 1 or None)
        start, stop, step = key.indices(len(self))
        if step != 1:
            return str.__getitem__(self, key)
        return self._cut(start, max(start, stop))

    def _cut(self, start: int, stop: int) -> "TrackedStr":
        spans = tuple(
            (max(a, start) - start, min(b, stop) - start, source, origin + max(start - a, 0))
            for a, b, source, origin in self.spans
            if a <= stop and b >= start
        )
        return TrackedStr(str.__getitem__(self, slice(start, stop)), spans)

    def _pieces(self, parts: Iterable[str]) -> list["TrackedStr"]:
        """`parts` of this string, in order and not overlapping, each cut out with its marks."""
        pieces, at = [], 0
        for part in parts:
            at = self.find(part, at)
            pieces.append(self._cut(at, at + len(part)))
            at += len(part)
        return pieces

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars=None):
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars=None):
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix):
        if prefix and self.startswith(prefix):
            return self._cut(len(prefix), len(self))
        return self

    def removesuffix(self, suffix):
        if suffix and self.endswith(suffix):
            return self._cut(0, len(self) - len(suffix))
        return self

    def split(self, sep=None, maxsplit=-1):
        return self._split(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._split(str.rsplit(self, sep, maxsplit), sep)

    def _split(self, parts, sep):
        if sep is None:
            return self._pieces(parts)
        pieces, at = [], 0
        for part in parts:
            pieces.append(self._cut(at, at + len(part)))
            at += len(part) + len(sep)
        return pieces

    def splitlines(self, keepends=False):
        lines = self._pieces(str.splitlines(self, True))
        if keepends:
            return lines
        return [line._cut(0, len(str.splitlines(line)[0])) for line in lines]

    def partition(self, sep):
        return self._halves(str.partition(self, sep))

    def rpartition(self, sep):
        return self._halves(str.rpartition(self, sep))

    def _halves(self, parts):
        head, sep, _ = map(len, parts)
        return self._cut(0, head), self._cut(head, head + sep), self._cut(head + sep, len(self))

    def replace(self, old, new, count=-1):
        if not old:
            return str.replace(self, old, new, count)
        if old not in self:
            return self
        return concat(self.split(old, count), new)

    def join(self, parts):
        return concat(parts, self)


class TrackedDict(dict[Any, Any]):
    """A mapping from a message: its JSON text is marked as that message's."""

    __slots__ = ("source",)
    source: Source


class TrackedList(list[Any]):
    """A list from a message: its JSON text is marked as that message's."""

    __slots__ = ("source",)
    source: Source


_TYPES = re.compile(r"\bposttrain\.data\.provenance\.Tracked(Str|Dict|List)\b")


def without_marks(error: str) -> str:
    """The text of an error that a template raises, with Python's own names of types."""
    return _TYPES.sub(lambda match: match[1].lower(), error)


def _moved(spans: tuple[Span, ...], by: int) -> tuple[Span, ...]:
    return tuple([(a + by, b + by, source, origin) for a, b, source, origin in spans])


def concat(parts: Iterable[str], separator: str = "") -> str:
    """`separator.join(parts)` that keeps the marks of parts and separator."""
    parts = list(parts)
    if separator and len(parts) > 1:
        joined = parts[:1]
        for part in parts[1:]:
            joined += [separator, part]
        parts = joined
    text = "".join(parts)
    spans: list[Span] = []
    at = 0
    for part in parts:
        if type(part) is TrackedStr:
            spans += _moved(part.spans, at)
        at += len(part)
    if not spans:
        return text
    return TrackedStr(text, tuple(spans))


def mark(value: object, source: Source) -> Any:
    """`value` with every string in it, at any depth, marked as coming from its place within `source`."""
    if isinstance(value, str):
        return TrackedStr(value, ((0, len(value), source, 0),))
    if isinstance(value, dict):
        mapping = TrackedDict()
        for key, item in value.items():
            mapping[key] = mark(item, Source(source.message, source.field, (*source.path, key)))
        mapping.source = source
        return mapping
    if isinstance(value, list):
        items = TrackedList()
        for index, item in enumerate(value):
            items.append(mark(item, Source(source.message, source.field, (*source.path, index))))
        items.source = source
        return items
    return value


def source_of(value: object) -> Source | None:
    """Where a marked string or container comes from; None for anything else."""
    if type(value) is TrackedStr:
        return value.spans[0][2] if value.spans else None
    return getattr(value, "source", None)
