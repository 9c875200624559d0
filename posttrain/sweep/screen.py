"""What a sweep shows: on a terminal a live line for each trial that runs, and one line that stays for each that ended.

A trial's own output is in its logs/console.log.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from posttrain.report.comparison import format_value
from posttrain.sweep.trial import CONSOLE, Trial
from posttrain.train.console import LiveLine, ScreenPipe, shown, start_live
from posttrain.utils import stop, working
from posttrain.utils.durations import format_duration
from posttrain.utils.working import PLAIN_INTERVAL_S, REFRESH_S


class RunningTrial:
    """What the launcher of a running trial says of it: the screen at the other end of its pipe.

    Args:
        title: its number and its values.

    Attributes:
        began, said: when it began and when a line about it was printed, as of time.monotonic.
    """

    def __init__(self, title: str) -> None:
        self.line = LiveLine(title)
        self.line.phase("starting")
        self.pipe = ScreenPipe()
        self.began = self.said = time.monotonic()

    def phase(self, name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """See Screen."""
        self.line.phase(name, done, total, unit)

    def start(self, step: int, steps: int) -> None:
        """See Screen."""
        self.line.step, self.line.steps = step, steps

    def step(self, step: int, values: dict[str, Any]) -> None:
        """See Screen."""
        self.line.measured(step, values)


class SweepScreen:
    """Standard error of a sweep.

    Args:
        total: trials of the sweep.
        parallel: how many run at once.

    Attributes:
        running: by name.
        best: of the trials that have ended, None as long as none has a loss.
        left: trials that have not ended.
        seconds: how long those took that have run to their end.
    """

    def __init__(self, total: int, parallel: int) -> None:
        working.stop()  # trials are forked
        sys.stderr.flush()
        stream = stop.tolerant_stream(2, sys.stderr.encoding)
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.on_terminal = stream.isatty() and not self.console.is_dumb_terminal
        self.total = total
        self.parallel = parallel
        self.running: dict[str, RunningTrial] = {}
        self.best: Trial | None = None
        self.left = total
        self.seconds: list[float] = []
        self.live: Live | None = None
        self.drawn = 0.0

    def finished_before(self, trials: list[Trial]) -> None:
        """Take the results of trials that have finished in an earlier command."""
        self.left -= len(trials)
        for trial in trials:
            self._compare(trial)
        if trials:
            self.print(f"{len(trials)} of {self.total} trials have already finished")

    def started(self, trial: Trial) -> int:
        """A trial is about to start; returns the descriptor by which its launcher is to report."""
        running = RunningTrial(f"{self._number(trial)}  {trial.name}")
        self.running[trial.name] = running
        if self.live is None and self.on_terminal:
            self.live = start_live(self, self.console)
        return running.pipe.inherited

    def refresh(self) -> None:
        """Draw again; in a file, a line for each trial now and then. To be called often."""
        for running in self.running.values():
            running.pipe.show(running)
        now = time.monotonic()
        if self.live:
            if now - self.drawn >= REFRESH_S:
                self.drawn = now
                self.live.refresh()
            return
        for running in self.running.values():
            if now - running.said >= PLAIN_INTERVAL_S:
                running.said = now
                doing = running.line.plain() if running.line.numbers else running.line.described()
                self.print(f"{running.line.title}  {doing}  {format_duration(now - running.began)}")

    def ended(self, trial: Trial) -> None:
        """The line of a trial that has ended."""
        running = self.running.pop(trial.name)
        running.pipe.close()
        took = time.monotonic() - running.began
        self.left -= 1
        if not trial.error:
            self.seconds.append(took)
        self._compare(trial)
        parts = [running.line.title, trial.outcome()]
        if trial is self.best:
            parts[-1] += " (best)"
        elif self.best:
            parts.append(f"best: {self._best()}")
        parts.append(format_duration(took))
        self.print("  ".join([*parts, *self._time_left()]))
        if trial.error and not trial.stopped:
            self.print(f"its log: {trial.directory / CONSOLE}")

    def print(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"posttrain: {shown(text)}")

    def stop(self) -> None:
        """End the live lines."""
        if self.live:
            self.live.stop()
            self.live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        width = options.max_width - 1  # some terminals begin a new line after the last column
        for running in self.running.values():
            yield Text(running.line.text(width), no_wrap=True, overflow="crop")
        parts = [f"{self.total - self.left} of {self.total} trials done"]
        if self.best:
            parts.append(f"best: {self._best()}")
        summary = Text("  ".join([*parts, *self._time_left()]), no_wrap=True)
        summary.truncate(width, overflow="ellipsis")
        yield summary

    def _compare(self, trial: Trial) -> None:
        if trial.value is None or not math.isfinite(trial.value):
            return
        if self.best is None or self.best.value is None or trial.value < self.best.value:
            self.best = trial

    def _best(self) -> str:
        assert self.best is not None
        return f"{format_value(self.best.value)} with {self.best.name}"

    def _number(self, trial: Trial) -> str:
        return f"{trial.config.hydra.job.num + 1}/{self.total}"

    def _time_left(self) -> list[str]:
        """How long the rest takes, if it takes as long as what has run; empty where nothing is left or known."""
        if not self.seconds or not self.left:
            return []
        later = self.seconds[1:]  # the first trial starts the worker, which the next ones find
        usual = statistics.median(later or self.seconds)
        now = time.monotonic()
        seconds = usual * (self.left - len(self.running))
        for running in self.running.values():
            seconds += max(0.0, usual - (now - running.began))
        about = "about"
        if not later:
            about = "at most"
        return [f"{about} {format_duration(seconds / min(self.parallel, self.left))} left"]
