"""Whether the ranks get on: each tells the launcher, through a pipe, when it begins a step and when it has ended it.

Between steps a rank may validate, save or export for as long as it takes; in a step all ranks depend on each other,
and one that stops answering stops all. No torch here.
"""

import contextlib
import os
import time

FD = "POSTTRAIN_HEARTBEAT_FD"
BEGUN, ENDED = b"(", b")"


class Heartbeat:
    """A rank's end of the pipe; without a launcher it does nothing."""

    def __init__(self) -> None:
        self.descriptor = int(os.environ.get(FD, -1))

    def begin(self) -> None:
        """A step begins."""
        self._write(BEGUN)

    def end(self) -> None:
        """The step has ended."""
        self._write(ENDED)

    def _write(self, byte: bytes) -> None:
        if self.descriptor >= 0:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the launcher's troubles are not the rank's
                os.write(self.descriptor, byte)


class Monitor:
    """The launcher's end of a rank's pipe.

    Args:
        rank: whose.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.descriptor, self.inherited = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self.inherited, False)
        self.since: float | None = None  # when the step that it is in began; None: it is in none

    def started(self) -> None:
        """The rank has its end; close ours."""
        os.close(self.inherited)

    def in_step_for(self) -> float:
        """Seconds since the rank began the step that it is in; 0 between steps."""
        with contextlib.suppress(BlockingIOError):
            while news := os.read(self.descriptor, 4096):
                self.since = time.monotonic() if news[-1:] == BEGUN else None
        return 0.0 if self.since is None else time.monotonic() - self.since

    def close(self) -> None:
        """The rank has ended."""
        os.close(self.descriptor)
