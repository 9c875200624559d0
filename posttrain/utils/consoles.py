"""Tables and colours on standard output."""

import errno
import os

import rich.console


class Console(rich.console.Console):
    """Rich's console, of which a reader that has gone (`| head`) makes no exit code of its own.

    Rich's ends the program with 1, which of some commands is an answer. `posttrain.utils.stop.command` decides instead.
    """

    def on_broken_pipe(self) -> None:
        """Asked by Rich while it handles the error.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
