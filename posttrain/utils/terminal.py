"""The first lines on a terminal, before anything is imported that takes long."""

import sys

from posttrain.utils import stop, working
from posttrain.utils.version import VERSION

RUNS = ("-m", "--multirun", "--rerun", "--resume", "--config-dir", "-cd")  # options of commands that run something


def begin_module() -> None:
    """Say on a terminal that a command has begun, and end in one line at Ctrl-C while it imports, which takes a second.

    It is for `python -m posttrain.COMMAND`; `python -m posttrain` greets, and other modules are no commands.
    """
    module = "".join(sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]) if "-m" in sys.orig_argv else ""
    if module.count(".") == 1:
        stop.exit_on_signals()
        working.begin("starting")


def greet() -> None:
    """Say on a terminal that a run has begun; nothing where the command only prints (`--help`, `--cfg job`)."""
    options = [argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("-")]
    prints = any(option not in RUNS for option in options) or {"recipe=list", "recipe.name=list"} & set(sys.argv)
    if not prints and sys.stdout is not None and sys.stdout.isatty():
        print(f"posttrain {VERSION}", flush=True)
        working.begin(working.READING)
