"""What a command does while nothing else is to be seen: it composes, reads, imports, loads.

A thread draws it, since the command's own is busy: on a terminal a live line on standard error, elsewhere a line every
ten seconds of a phase. What is printed meanwhile comes above the live line. A run has a screen of its own, to which a
rank's `phase` reports (train/console.py). Nothing heavy is imported here.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from posttrain.utils.durations import format_duration

REFRESH_S = 0.25  # between drawings of a live line
PLAIN_INTERVAL_S = 10.0  # between lines where there is no terminal
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
READING = "reading the configuration"  # the first phase of a command that has one
CLEAR = "\r\x1b[2K"  # the whole line


class Phase:
    """What is done now.

    Attributes:
        name: in a word or two.
        since: when it began, as of time.monotonic.
        done, total: of what it consists of; a total of 0: not known.
        unit: of those; empty: they are counted.
    """

    def __init__(self) -> None:
        self.name = ""
        self.since = time.monotonic()
        self.done = self.total = 0
        self.unit = ""

    def phase(self, name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Say what is done now; under the same name its time goes on."""
        if name != self.name:
            self.name = name
            self.since = time.monotonic()
        self.done, self.total, self.unit = done, total, unit

    def elapsed(self) -> float:
        """Seconds that it has taken."""
        return time.monotonic() - self.since

    def described(self) -> str:
        """Its name, and how much of it is done."""
        share = f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}"
        if not self.total and not self.done:
            return self.name
        return " ".join(filter(None, [self.name, share, self.unit]))

    def spinner(self) -> str:
        """A character that changes with the time."""
        return SPINNER[int(self.elapsed() / REFRESH_S) % len(SPINNER)]


class AboveLine:
    """A standard stream on a terminal: what is printed to it takes the place of the live line, which comes again below.

    Args:
        stream: the real one.
        line: the live line.
    """

    def __init__(self, stream: TextIO, line: "WorkingLine") -> None:
        self.stream = stream
        self.line = line

    def write(self, text: str) -> int:
        """As of the stream."""
        with self.line.lock:
            self.line.clear()
            written = self.stream.write(text)
            self.stream.flush()
            if text:
                self.line.broken = not text.endswith("\n")
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class WorkingLine:
    """The line of this process, from construction until `stop`.

    Args:
        phase: what is done first.

    Attributes:
        lock: held while something is written.
        drawn: whether the live line is on the terminal.
        broken: whether what was printed last didn't end its line, where nothing is to be drawn then.
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.lock = threading.RLock()
        self.drawn = False
        self.broken = False
        self.ended = threading.Event()
        self.stream = sys.stderr
        self.on_terminal = self.stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self.said = time.monotonic()
        if self.on_terminal:
            sys.stdout, sys.stderr = (self._above(stream) for stream in (sys.stdout, sys.stderr))
        self.thread = threading.Thread(target=self._run, name="working", daemon=True)
        self.thread.start()

    def _above(self, stream: TextIO) -> Any:
        return AboveLine(stream, self) if stream.isatty() else stream

    def _run(self) -> None:
        while not self.ended.wait(REFRESH_S):
            with self.lock:
                if not self.ended.is_set():
                    self._show()

    def _show(self) -> None:
        text = f"{self.phase.described()}  {format_duration(self.phase.elapsed())}"
        try:
            if self.on_terminal and not self.broken:
                width = (os.get_terminal_size(self.stream.fileno()).columns or 80) - 1
                self.stream.write(CLEAR + f"{self.phase.spinner()} {text}"[:width])
                self.stream.flush()
                self.drawn = True
            elif not self.on_terminal and time.monotonic() - max(self.said, self.phase.since) >= PLAIN_INTERVAL_S:
                self.said = time.monotonic()
                self.stream.write(f"posttrain: {text}\n")
                self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone, the stream is closed
            self.ended.set()

    def clear(self) -> None:
        """Take the live line away, until it is drawn again."""
        if self.drawn:
            self.drawn = False
            self.stream.write(CLEAR)
            self.stream.flush()

    def stop(self) -> None:
        """End it."""
        with self.lock:
            self.ended.set()
            self.clear()
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if isinstance(stream, AboveLine):
                    setattr(sys, name, stream.stream)
        if self.thread is not threading.current_thread():
            self.thread.join()


type Report = Callable[[str, int, int, str], None]  # see `phase`

_line: WorkingLine | None = None
_report: Report | None = None


def begin(name: str) -> None:
    """Begin to show what this process does: a command's, until `stop`.

    Args:
        name: of the first phase.
    """
    global _line
    if _line is None:
        first = Phase()
        first.phase(name)
        _line = WorkingLine(first)
        atexit.register(stop)
        report_to(first.phase)
    phase(name)


def report_to(report: Report | None) -> None:
    """Let `report` have what `phase` is told; None: nobody."""
    global _report
    _report = report


def phase(name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
    """Say what this process does now; nothing where nobody shows it.

    Args:
        name: in a word or two; under the same name its time goes on.
        done: how much of it is done.
        total: of how much; 0: not known.
        unit: of `done` and `total`.
    """
    if _report is not None:
        _report(name, done, total, unit)


def counted[T](items: Iterable[T], name: str, total: int, unit: str = "") -> Iterator[T]:
    """Yield `items` of the phase `name`, of which there are `total`."""
    phase(name, 0, total, unit)
    for done, item in enumerate(items, 1):
        yield item
        phase(name, done, total, unit)


def bytes_of(name: str, total: int) -> Callable[[int], None]:
    """Begin the phase `name` with `total` bytes; returns what is to be told of those that are done."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        phase(name, min(done, total) >> 20, total >> 20, "MiB")  # headers are no tensor's

    advance(0)
    return advance


def clearing() -> str:
    """What takes the live line away, to be written before the last words of a process that ends at once."""
    return CLEAR if _line is not None and _line.drawn else ""


def stop() -> None:
    """End what `begin` began: before a process is forked, and before something else draws or asks."""
    global _line
    line, _line = _line, None
    if line is not None:
        report_to(None)
        atexit.unregister(stop)
        line.stop()
