"""How much work and memory a chat template may take for one row: a template is a program, and may be a stranger's.

Passes of loops and calls are counted, and so are the characters of the texts that are put together. What could make
much out of little in one step (a width, a replacement) is looked at before it is done. Counts end the same row in the
same way each time, which a clock would not.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jinja2

MAX_STEPS = 1 << 18  # passes of loops and calls for a row; a long conversation takes thousands
MAX_MADE = 1 << 28  # characters of all texts that are put together for a row; an item of a list counts as ITEM
ITEM = 16
MAX_WIDTH = 1 << 20  # characters, or items, that one padding, indentation or format may ask for
# The width that a format asks for: `%10000000d`, `{:>10000000}`, or one that is an argument itself.
WIDE_FORMAT = re.compile(r"\d{7,}|%[^%a-zA-Z]*\*|\{[^{}]*\{")
PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice")
FORMATS = ("format", "format_map")
LOOKED_AT = frozenset((*PADDING, *FORMATS, "replace"))  # methods of a text that can make much of little


class TooMuch(jinja2.TemplateError):
    """A row takes a template more work or memory than any conversation does."""


class Budget:
    """What is left for one row."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A row begins."""
        self.steps = MAX_STEPS
        self.left = MAX_MADE

    def step(self) -> None:
        """Count a pass of a loop, or a call.

        Raises:
            TooMuch: there have been MAX_STEPS.
        """
        self.steps -= 1
        if self.steps < 0:
            raise TooMuch(f"more than {MAX_STEPS:,} passes of loops and calls for one row")

    def made(self, size: int) -> None:
        """Count a text or list that is put together, by its length, before or after it is.

        Raises:
            TooMuch: there is more than MAX_MADE of them.
        """
        self.left -= size
        if self.left < 0:
            raise TooMuch(f"texts and lists of more than {MAX_MADE:,} characters for one row")

    def written(self, parts: Iterable[str]) -> Iterator[str]:
        """The parts of what a template writes, counted one by one."""
        for part in parts:
            self.left -= len(part)  # here and not by `made`: there are some for each message
            if self.left < 0:
                self.made(0)
            yield part

    def before(self, name: str, text: object, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        """Look at a method or filter of a text, or of a list, before it is called.

        Args:
            name: of the method or filter.
            text: whose it is.
            arguments, named: of the call.

        Raises:
            TooMuch: its result could be much longer than what it is given.
        """
        if name in PADDING:
            widths = [value for value in (*arguments, *named.values()) if isinstance(value, int)]
            lines = text.count("\n") + 1 if isinstance(text, str) else 1
            if max(widths, default=0) * lines > MAX_WIDTH:
                raise TooMuch(f"`{name}` makes a text or list of more than {MAX_WIDTH:,}")
        elif name == "replace" and isinstance(text, str) and len(arguments) > 1:
            self.made(_replaced(text, str(arguments[0]), str(arguments[1])))
        elif name in FORMATS and isinstance(text, str) and WIDE_FORMAT.search(text):
            raise TooMuch(f"`{name}` with a width of more than {MAX_WIDTH:,}, or one that is an argument")
        elif name == "%" and isinstance(text, str | bytes):
            pattern = text if isinstance(text, str) else text.decode("latin-1")
            if WIDE_FORMAT.search(pattern):
                raise TooMuch(f"`%` with a width of more than {MAX_WIDTH:,}, or one that is an argument")

    def counted(self, name: str, plain: Callable[..., Any], passed: bool) -> Callable[..., Any]:
        """The filter `plain`, looked at and counted.

        Args:
            passed: whether Jinja passes its context before the value.
        """

        def counting(*arguments: object, **named: object) -> Any:
            self.step()
            own = arguments[1:] if passed else arguments
            if own:
                self.before(name, own[0], own[1:], named)
            result = plain(*arguments, **named)
            if isinstance(result, Sized):
                self.made(len(result))
            return result

        # How Jinja knows what to pass, and that it may not compute the filter while it compiles.
        counting.__dict__.update(getattr(plain, "__dict__", {}))
        return counting


def _replaced(text: str, old: str, new: str) -> int:
    times = text.count(old) if old else len(text) + 1
    return times * len(new)
