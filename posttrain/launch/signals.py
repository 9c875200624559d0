"""Signals to the command that starts a run's ranks."""

import signal
import threading
from types import FrameType
from typing import Protocol, Self

from posttrain.errors import RunFailed

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def nohup() -> bool:
    """Whether SIGHUP is ignored, as `nohup` asks for: then it stays so."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


class Receiver(Protocol):
    """The ranks of a run, as far as signals go.

    Attributes:
        signalled_after_end: whether a signal came when all ranks had ended.
    """

    signalled_after_end: bool

    def on_signal(self, number: int) -> None:
        """Act on a signal."""


class SignalRelay:
    """Context manager that takes the signals from before there are ranks until their end has been recorded.

    Before there are ranks, a signal ends the command. Then it is passed to `run.on_signal`, which tells the ranks. Once
    they have all ended, a signal changes nothing: Slurm signals every node of a job when one of them has failed.

    Attributes:
        run: the running or ended ranks, or None.

    Raises:
        RunFailed: in the main thread, at a signal before there are ranks.
    """

    run: Receiver | None = None

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in FORWARDED:
            if number == signal.SIGHUP and nohup():
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.run is None:
            raise stopped(number, "stopped by {} before it began")
        self.run.on_signal(number)


def stopped(number: int, message: str) -> RunFailed:
    """The error of a run that signal `number` has stopped; `{}` in the message becomes the signal's name."""
    error = RunFailed(message.format(signal.Signals(number).name))
    error.stopped = True
    error.restartable = False
    error.exit_code = 128 + number
    return error
