"""How a command ends when it is told to: in one line, with the exit code of the signal, and with its scratch removed.

SIGTERM and SIGHUP (a closed terminal, a dropped connection) are to a command what Ctrl-C is. While there are ranks,
signals are theirs: launch/signals.py. Nothing heavy is imported here: the commands come here first.
"""

import atexit
import errno
import functools
import gc
import io
import os
import select
import signal
import sys
from collections.abc import Buffer, Callable
from types import FrameType
from typing import NoReturn

from posttrain.errors import UserError, location_error
from posttrain.utils import limits, working
from posttrain.utils.escape import escape_control
from posttrain.utils.version import VERSION

FULL_ERROR = "HYDRA_FULL_ERROR"

ENDING = (signal.SIGTERM, signal.SIGHUP)
GONE = (errno.EIO, errno.EPIPE)  # of a terminal that was closed, of a pipe that nobody reads


class Stopped(KeyboardInterrupt):
    """A signal has told this command to end; what tidies up after Ctrl-C does so after it.

    Args:
        number: of the signal.
        done: what of its work is done, in a few words; empty: nothing is said of it.
        advice: a line about how to continue; empty: there is none.
    """

    def __init__(self, number: int, done: str = "", advice: str = "") -> None:
        self.number = number
        self.exit_code = 128 + number
        self.advice = advice
        message = f"stopped by {signal.Signals(number).name}"
        if done:
            message += f": {done}"
        super().__init__(message)


def signal_of(error: KeyboardInterrupt) -> int:
    """The signal behind an error; Python's own is Ctrl-C's."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT


def exit_for(error: KeyboardInterrupt) -> NoReturn:
    """Say in one line what ended the command, in another how to continue if that is known, and exit with its code."""
    stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
    print(f"posttrain: {stopped}", file=sys.stderr)
    if stopped.advice:
        print(f"posttrain: {stopped.advice}", file=sys.stderr)
    raise SystemExit(stopped.exit_code) from None


def is_handled(number: int) -> bool:
    """Whether a signal means anything here: what is ignored from the start stays so.

    SIGHUP is under `nohup`, SIGINT in a background process of a script.
    """
    return signal.getsignal(number) is not signal.SIG_IGN


def raise_on_signals() -> None:
    """From now on SIGTERM and SIGHUP raise `Stopped` in the main thread."""
    command = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one needs no tidying up
        if os.getpid() != command:  # of a process that was forked
            os.kill(os.getpid(), number)
        raise Stopped(number)

    for number in filter(is_handled, ENDING):
        signal.signal(number, stop)
    if is_handled(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_on_signals() -> None:
    """Until `command` installs its handlers, exit at Ctrl-C, SIGTERM and SIGHUP: imports leave nothing."""

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{working.clearing()}posttrain: {Stopped(number)}\n".encode())
        os._exit(128 + number)

    for number in filter(is_handled, (signal.SIGINT, *ENDING)):
        signal.signal(number, leave)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate the `main` of a command: see this module. Closed streams are opened, low limits are raised.

    `--version` prints the version of posttrain.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        open_streams()
        atexit.register(gc.freeze)  # or Python looks through half a million objects of torch's before it ends: seconds
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
        raise_on_signals()
        try:
            limits.raise_low()
            if "--version" in sys.argv[1:]:
                print(f"posttrain {VERSION}")
                return
            main()
        except (UserError, OSError) as error:  # that the command has left to us
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
                raise SystemExit(128 + signal.SIGPIPE) from None
            message = location_error(error) if isinstance(error, OSError) else str(error)
            if message is None or os.environ.get(FULL_ERROR) == "1":
                raise
            print(f"posttrain: {escape_control(message)}", file=sys.stderr)
            raise SystemExit(UserError.exit_code) from None
        except KeyboardInterrupt as error:
            exit_for(error)
        finally:
            working.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapped


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more: `| head` has seen enough."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def open_streams() -> None:
    """Open closed standard streams (`>&-`) as /dev/null: else another file would get the number of one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115  (for this process)
            setattr(sys, name, stream)


class TolerantFile(io.FileIO):
    """A descriptor that may be written to though nobody reads any more."""

    def write(self, content: Buffer, /) -> int:
        """As of io.FileIO; what can't be written because the terminal or the reader is gone is lost."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(content).nbytes


def tolerant_stream(descriptor: int, encoding: str | None = None) -> io.TextIOWrapper:
    """A text stream of `descriptor`, line by line, whose end is not the end of the process.

    Args:
        descriptor: stays open when the stream is closed.
        encoding: what the terminal understands; None: the locale's. Other characters are written as escapes.
    """
    raw = io.BufferedWriter(TolerantFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def outlive_terminal() -> None:
    """Let this process write to its standard streams though the terminal is gone; not where they have been replaced."""
    working.stop()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, tolerant_stream(stream.fileno(), stream.encoding))


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `message` to stderr and exit with `code`."""
    print(f"posttrain: {escape_control(message)}", file=sys.stderr)
    raise SystemExit(code)
