"""What the person at the terminal sees; everything else a rank prints goes to its log file.

The launcher alone draws (`Screen`), so the terminal has one owner, which answers while a rank imports or computes. The
first rank says what to draw (`RankScreen`) through a pipe (`ScreenPipe`), and a trial's launcher tells its sweep in the
same way what it does (`report_to`). No torch here.
"""

import contextlib
import json
import os
import select
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from posttrain.utils import stop, working
from posttrain.utils.durations import format_duration
from posttrain.utils.escape import escape_control
from posttrain.utils.rank_environment import UI_FD
from posttrain.utils.working import PLAIN_INTERVAL_S, REFRESH_S, Phase

TRAINING = "training"  # the phase in which there are steps to be told
BAR = 20  # columns
READ_BYTES = 1 << 16


def shown(text: str | None) -> str:
    """Text from outside as it may be drawn: no control character acts, no bracket is markup."""
    return escape(escape_control(text or ""))


class LiveLine(Phase):
    """The last line of a terminal: the phase of a run, how long it has taken, and the step with its numbers.

    Attributes:
        title: whose phase it is, where there are several.
        step, steps: of the training; no steps: it has not begun.
        numbers: of the last step, the most important first.
        eta: seconds to the end of the training; None: not known.
    """

    def __init__(self, title: str = "") -> None:
        super().__init__()
        self.title = title
        self.step = self.steps = 0
        self.numbers: list[str] = []
        self.eta: float | None = None

    def measured(self, step: int, values: dict[str, Any]) -> None:
        """Take the numbers of a step."""
        numbers = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
        if values.get("grad_norm") is not None:
            numbers.append(f"norm {values['grad_norm']:.2f}")
        supervised = values["supervised_tokens_per_second"]
        numbers.append(f"{supervised:,.0f} supervised tok/s of {values['tokens_per_second']:,.0f}")
        if values.get("mfu") is not None:
            numbers.append(f"MFU {values['mfu']:.0%}")
        self.step, self.numbers = step, numbers
        self.eta = (self.steps - step) * values["step_seconds"]

    def plain(self) -> str:
        """The step with all its numbers, for a line of a file."""
        eta = f"eta {format_duration(self.eta or 0.0)}"
        return "  ".join([f"step {self.step}/{self.steps}", *self.numbers, eta])

    def text(self, width: int) -> str:
        """The line, in at most `width` columns: what matters less is left out."""
        named = "  ".join(filter(None, [self.title, self.described()]))
        parts = {0: f"{self.spinner()} {named}", 3: format_duration(self.elapsed())}  # by their order in the line
        importance = [0, 3]
        if self.steps:
            parts |= {1: f"step {self.step}/{self.steps}", 2: _bar(self.step / self.steps)}
            importance = [0, 1, 3]
            if self.eta is not None and self.step < self.steps:
                parts[9] = f"eta {format_duration(self.eta)}"
                importance.append(9)
            parts |= dict(enumerate(self.numbers, 4))
            importance += [*range(4, 4 + len(self.numbers)), 2]
        kept: list[int] = []
        for part in importance:
            if cell_len(_joined(parts, [*kept, part])) <= width:
                kept.append(part)
        return _joined(parts, kept)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        # Not the last column: some terminals begin a new line there.
        yield Text(self.text(options.max_width - 1), no_wrap=True, overflow="crop")


def start_live(shown: RenderableType, console: Console) -> Live:
    """Begin to draw something below the lines that stay; drawn again by its `refresh`, gone at its `stop`."""
    live = Live(
        shown, console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    live.start()
    return live


def _bar(share: float) -> str:
    full = int(share * BAR)
    return "━" * full + "╌" * (BAR - full)


def _joined(parts: dict[int, str], kept: Iterable[int]) -> str:
    return "  ".join(parts[part] for part in sorted(kept))


class Screen:
    """The launcher's standard output: lines that stay, and on a terminal a live one below them.

    Args:
        file: where to draw.

    Attributes:
        watcher: who else is told of phases and steps.
    """

    def __init__(self, file: TextIO) -> None:
        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self.on_terminal = file.isatty() and not self.console.is_dumb_terminal
        self.line = LiveLine()
        self.live: Live | None = None
        self.watcher: RankScreen | None = None
        self.last_line = 0.0
        self.drawn = 0.0
        self.left_out = False  # a step, which has been said

    @classmethod
    def of_command(cls) -> "Screen":
        """The screen of this process, which goes on when its terminal is gone."""
        working.stop()
        sys.stdout.flush()
        screen = cls(stop.tolerant_stream(1, sys.stdout.encoding))
        screen.watcher = _watcher
        return screen

    def phase(self, name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Say what is done now, and how much of it; in a file only where it takes long."""
        self.line.phase(name, done, total, unit)
        if self.watcher:
            self.watcher.phase(name, done, total, unit)
        if self.live is None and self.on_terminal:
            self.live = start_live(self.line, self.console)
        self.refresh()

    def refresh(self) -> None:
        """Draw the live line again, or say now and then what is done between two steps; to be called often."""
        now = time.monotonic()
        if self.live:
            if now - self.drawn >= REFRESH_S:
                self.drawn = now
                self.live.refresh()
        elif self.line.name not in ("", TRAINING) and now - max(self.last_line, self.line.since) > PLAIN_INTERVAL_S:
            self.last_line = now
            self.print(f"{self.line.described()}  {format_duration(self.line.elapsed())}")

    def print(self, text: str) -> None:
        """A line that stays, above the live line; rich markup."""
        self.console.print(text)

    def start(self, step: int, steps: int) -> None:
        """The training begins at `step` of `steps`."""
        self.line.step, self.line.steps = step, steps
        if self.watcher:
            self.watcher.start(step, steps)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Move the live line, or print one now and then."""
        self.line.measured(step, values)
        if self.watcher:
            self.watcher.step(step, values)
        if self.live:
            return
        waited = time.monotonic() - self.last_line
        if waited > PLAIN_INTERVAL_S or step == self.line.steps:
            self.last_line = time.monotonic()
            self.print(self.line.plain())
        elif not self.left_out:
            self.left_out = True
            self.print(f"from here a line every {PLAIN_INTERVAL_S:.0f} s; each step is in metrics.jsonl")

    def stop(self) -> None:
        """End the live line, and the training's part of it."""
        if self.live:
            self.live.stop()
            self.live = None
        self.line = LiveLine()

    def result(self, summary: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Samples side by side, losses, and where everything is."""
        if samples:
            table = Table(title="Sample answers", show_lines=True)
            for name in ("prompt", "before", "after", "reference"):
                table.add_column(name, overflow="fold")
            for sample in samples:
                prompt = _tail(sample["prompt"])
                answers = [_without_blank_lines(sample.get(name, "")) for name in ("before", "after", "reference")]
                table.add_row(*map(shown, (prompt, *answers)))
            self.console.print(table, soft_wrap=False)
        if summary.get("profile"):
            table = Table(title="Milliseconds per step")
            for name, value in summary["profile"].items():
                table.add_row(name, f"{value:.2f}")
            self.console.print(table)
        directory = shown(shlex.quote(summary["run_dir"]))
        before, after = summary.get("val_loss_before"), summary.get("val_loss_after")
        if after is not None:
            line = f"validation loss [bold]{after:.4f}[/]"
            if before is not None:
                line = f"validation loss {before:.4f} -> [bold]{after:.4f}[/]"
            self.print(line)
            if before is not None and after > before:
                self.print(
                    "[yellow]that is worse than before training: the model it began with predicts the validation data "
                    "better. Use that one, or train again with a lower rate or fewer steps: "
                    f"python -m posttrain --rerun {directory} optimizer.lr=...[/]"
                )
        if summary.get("stopped_early"):
            self.print(shown(summary["stopped_early"]))
        if summary.get("supervised_tokens_per_second"):
            line = (
                f"{summary['supervised_tokens']:,} supervised tokens, {summary['supervised_tokens_per_second']:,.0f} "
                f"per second; peak memory {summary['peak_memory_gib']:.1f} GiB"
            )
            if "time_to_first_step_s" in summary:  # absent if the run was already complete when restarted
                line += f"; first step after {format_duration(summary['time_to_first_step_s'])}"
            self.print(line)
        self.print(f"run directory: {shown(summary['run_dir'])}")
        if summary.get("export"):
            which = ""
            if summary.get("exported_step") != summary.get("steps"):
                which = f" (of step {summary['exported_step']}, which has the lowest validation loss)"
            self.print(f"export: {shown(summary['export'])}{which}")
            self.print(f"ask it: python -m posttrain.generate {directory} 'your question'")
        self.print(f"its curves as a page: python -m posttrain.report {directory}")


def _without_blank_lines(answer: str) -> str:
    """An answer as a table has room for it: a weak model's can be hundreds of empty lines."""
    return "\n".join(filter(str.strip, answer.splitlines()))


def _tail(prompt: str, most: int = 240) -> str:
    """The end of a prompt, where the question is, without the role that the answer starts with."""
    lines = [""]
    lines += filter(str.strip, prompt.splitlines())
    if len(lines) > 2 and len(lines[-1]) < 12:  # "assistant", "model"
        lines.pop()
    text = lines[-1]
    return text if len(text) <= most else "..." + text[-most:]


class RankScreen:
    """A screen in another process: the launcher's for its first rank, the sweep's for a trial's launcher.

    Calls are passed on. Those of other ranks do nothing, nor do any without a launcher.

    Args:
        descriptor: of the ScreenPipe; None: as the launcher has said, -1: there is none.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = int(os.environ.get(UI_FD, -1)) if descriptor is None else descriptor
        self.last_phase: tuple[str, int, int, str] | None = None

    def phase(self, name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """See Screen."""
        if (name, done, total, unit) != self.last_phase:
            self.last_phase = name, done, total, unit
            self._send("phase", *self.last_phase)

    def print(self, text: str) -> None:
        """See Screen."""
        self._send("print", text)

    def start(self, step: int, steps: int) -> None:
        """See Screen."""
        self._send("start", step, steps)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """See Screen. Left out while the launcher is suspended: a rank doesn't wait for it."""
        if self.descriptor >= 0 and select.select([], [self.descriptor], [], 0)[1]:
            self._send("step", step, values)

    def stop(self) -> None:
        """See Screen."""
        self._send("stop")

    def result(self, summary: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """See Screen."""
        self._send("result", summary, samples)

    def _send(self, method: str, *arguments: object) -> None:
        if self.descriptor < 0:
            return
        left = json.dumps([method, *arguments]).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # the launcher's troubles are not the rank's
            while left:
                left = left[os.write(self.descriptor, left) :]


_watcher: RankScreen | None = None


def report_to(descriptor: int) -> None:
    """Tell the owner of a ScreenPipe what the screens of this command show.

    Args:
        descriptor: the pipe's inherited end.
    """
    global _watcher
    _watcher = RankScreen(descriptor)


class ScreenPipe:
    """The launcher's end of what the first rank has drawn.

    Attributes:
        inherited: the rank's end.
    """

    METHODS = ("phase", "print", "start", "step", "stop", "result")

    def __init__(self) -> None:
        self.descriptor, self.inherited = os.pipe()
        os.set_blocking(self.descriptor, False)
        self.unread = b""

    def started(self) -> None:
        """The rank has its end; close ours."""
        os.close(self.inherited)

    def show(self, screen: object) -> None:
        """Draw what has come since the last call, on something that has METHODS."""
        with contextlib.suppress(BlockingIOError):
            received = os.read(self.descriptor, READ_BYTES)
            while received:
                self.unread += received
                received = os.read(self.descriptor, READ_BYTES)
        *lines, self.unread = self.unread.split(b"\n")
        for line in lines:
            method, *arguments = json.loads(line)
            if method in self.METHODS:
                getattr(screen, method)(*arguments)

    def close(self) -> None:
        """The rank has ended."""
        os.close(self.descriptor)
