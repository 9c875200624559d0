"""Grids and searches: `--multirun`. Where trials live, which are still to do, how many run at once."""

import sys
from pathlib import Path

from posttrain.errors import UserError
from posttrain.utils import working

launched: set[Path] = set()  # directories of the sweeps that this command has launched


def summarize() -> None:
    """Table, page and link to the best of what was launched, however it ended; a launcher may be called many times."""
    if launched:
        working.begin("writing the report")
    while launched:
        from posttrain.report import write_report  # lists and tables for a terminal, which a run doesn't need

        try:
            log_stderr(f"report: {write_report(launched.pop())}")
        except UserError as error:  # a sweep is not spoiled by a report that can't be made
            log_stderr(str(error))


def log_stderr(text: str) -> None:
    """One line on stderr."""
    print(f"posttrain: {text}", file=sys.stderr, flush=True)
