"""Liveness: each rank reports progress to the launcher through a pipe.

A rank writes a byte when it begins a micro-batch (of a step or a validation) or a save, another when it has ended the
step, validation or save. In between all ranks depend on each other, and one that stops answering stops all; outside, a
rank may load, answer prompts or export for as long as it takes. No torch here.
"""

import contextlib
import os
import time

FD = "POSTTRAIN_HEARTBEAT_FD"
BEGUN = b"("
ENDED = b")"
READ_BYTES = 4096


class Heartbeat:
    """A rank's end of the pipe; without a launcher it does nothing."""

    def __init__(self) -> None:
        self.descriptor = int(os.environ.get(FD, -1))

    def begin(self) -> None:
        """Something begins that all ranks take part in."""
        self._write(BEGUN)

    def end(self) -> None:
        """It has ended."""
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
        self.since: float | None = None  # when it last began something; None: it has ended that

    def started(self) -> None:
        """The rank has its end; close ours."""
        os.close(self.inherited)

    def silent_for(self) -> float:
        """Seconds since the rank's last sign of life, 0 where none is to be expected."""
        with contextlib.suppress(BlockingIOError):
            received = os.read(self.descriptor, READ_BYTES)
            while received:
                self.since = time.monotonic() if received.endswith(BEGUN) else None
                received = os.read(self.descriptor, READ_BYTES)
        if self.since is None:
            return 0.0
        return time.monotonic() - self.since

    def close(self) -> None:
        """The rank has ended."""
        os.close(self.descriptor)
