"""A string that remembers which message its characters come from, through what chat templates do to strings.

A template is rendered with `Marked` message texts. Concatenating, trimming, splitting, slicing and replacing keep the
marks at the right characters; every other operation returns a plain string, so that text which can no longer be
attributed is never attributed wrongly.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Where text comes from: the index of the message (-1: the tool definitions) and the field within it."""

    message: int
    field: str


# start and end in the marked string (characters), source, offset of `start` in the source's own text
Span = tuple[int, int, Source, int]


class Marked(str):
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
            return Marked(str.__add__(self, other), self.spans)
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other):
        if type(other) is str:
            return Marked(str.__add__(other, self), _moved(self.spans, len(other)))
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key):
        if not isinstance(key, slice):
            key = slice(key, key + 1 or None)
        start, stop, step = key.indices(len(self))
        return self._cut(start, max(start, stop)) if step == 1 else str.__getitem__(self, key)

    def _cut(self, start: int, stop: int) -> "Marked":
        spans = tuple(
            (max(a, start) - start, min(b, stop) - start, source, origin + max(start - a, 0))
            for a, b, source, origin in self.spans
            if a <= stop and b >= start
        )
        return Marked(str.__getitem__(self, slice(start, stop)), spans)

    def _pieces(self, parts: Iterable[str]) -> list["Marked"]:
        """`parts` of this string, in order and not overlapping, each cut out with its marks."""
        found, at = [], 0
        for part in parts:
            at = self.find(part, at)
            found.append(self._cut(at, at + len(part)))
            at += len(part)
        return found

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars=None):
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars=None):
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix):
        return self._cut(len(prefix), len(self)) if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix):
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def split(self, sep=None, maxsplit=-1):
        return self._split(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._split(str.rsplit(self, sep, maxsplit), sep)

    def _split(self, parts, sep):
        if sep is None:
            return self._pieces(parts)
        found, at = [], 0
        for part in parts:
            found.append(self._cut(at, at + len(part)))
            at += len(part) + len(sep)
        return found

    def splitlines(self, keepends=False):
        whole = self._pieces(str.splitlines(self, True))
        return whole if keepends else [line._cut(0, len(str.splitlines(line)[0])) for line in whole]

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
        return concat(self.split(old, count), new) if old in self else self

    def join(self, parts):
        return concat(parts, self)


class MarkedDict(dict):
    """A mapping from a message: its JSON text is marked as that message's."""

    __slots__ = ("source",)


class MarkedList(list):
    """A list from a message: its JSON text is marked as that message's."""

    __slots__ = ("source",)


def _moved(spans: tuple[Span, ...], by: int) -> tuple[Span, ...]:
    return tuple([(a + by, b + by, source, origin) for a, b, source, origin in spans])


def concat(parts: Iterable[str], separator: str = "") -> str:
    """`separator.join(parts)` that keeps the marks of parts and separator."""
    parts = list(parts)
    if separator and len(parts) > 1:
        parts = [piece for part in parts for piece in (separator, part)][1:]
    text = "".join(parts)
    spans, at = [], 0
    for part in parts:
        if type(part) is Marked:
            spans += _moved(part.spans, at)
        at += len(part)
    return Marked(text, tuple(spans)) if spans else text


def mark(value: Any, source: Source) -> Any:
    """`value` with every string in it, at any depth, marked as coming from `source`."""
    if isinstance(value, str):
        return Marked(value, ((0, len(value), source, 0),))
    if isinstance(value, dict):
        marked = MarkedDict((key, mark(item, source)) for key, item in value.items())
    elif isinstance(value, list):
        marked = MarkedList(mark(item, source) for item in value)
    else:
        return value
    marked.source = source
    return marked


def source_of(value: Any) -> Source | None:
    """Where a marked string or container comes from; None for anything else."""
    if type(value) is Marked:
        return value.spans[0][2] if value.spans else None
    return getattr(value, "source", None)
