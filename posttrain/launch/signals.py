"""Signals to the command that starts a run's ranks."""

import signal
import threading
from typing import Any

from posttrain.errors import RunFailed

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def nohup() -> bool:
    """Whether SIGHUP is ignored, as `nohup` asks for: then it stays so."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


class Relay:
    """Context manager: from before there are ranks until what became of them is written down, it takes the signals.

    Before there are ranks a signal ends the command. Then it is `run.on_signal`'s, which tells the ranks; once they
    have all ended, how they ended stands: Slurm signals every node of a job when one of them has failed.

    Attributes:
        run: the running or ended NodeRun, or None.

    Raises:
        RunFailed: in the main thread, at a signal before there are ranks.
    """

    run = None

    def __enter__(self) -> "Relay":
        main = threading.current_thread() is threading.main_thread()
        taken = [number for number in FORWARDED if main and not (number == signal.SIGHUP and nohup())]
        self._before = {number: signal.signal(number, self._on_signal) for number in taken}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.run is None:
            raise stopped(number, "stopped by {} before it began")
        self.run.on_signal(number)


def stopped(number: int, message: str) -> RunFailed:
    """The error of a run that signal `number` has stopped; `{}` in the message becomes the signal's name."""
    error = RunFailed(message.format(signal.Signals(number).name))
    error.stopped, error.restartable, error.exit_code = True, False, 128 + number
    return error
