"""The first lines on a terminal, before anything is imported that takes long."""

import sys

from posttrain import __version__
from posttrain.utils import working

RUNS = ("-m", "--multirun", "--rerun", "--resume", "--config-dir", "-cd")  # options of commands that run something


def greet() -> None:
    """Say on a terminal that a run has begun; nothing where the command only prints (`--help`, `--cfg job`)."""
    options = [argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("-")]
    prints = any(option not in RUNS for option in options) or {"recipe=list", "recipe.name=list"} & set(sys.argv)
    if not prints and sys.stdout is not None and sys.stdout.isatty():
        print(f"posttrain {__version__}", flush=True)
        working.begin(working.READING)
