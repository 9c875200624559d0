"""What came out of a sweep, or of one run: a table in the terminal, a page to look into, a link to the best.

Everything is read from the run directories, so a report can be made at any time, while trials are still running too.
"""

import os
from pathlib import Path

from posttrain.errors import UserError
from posttrain.files import write_text
from posttrain.report.table import print_table
from posttrain.report.trials import Trial, best_trial, read_trials


def report(directory: Path, out: Path | None = None) -> Path:
    """Print the table of the runs in `directory`, write the page, and point `directory/best` to the best one's export.

    Args:
        directory: of a sweep, or of a run.
        out: the page; None: report.html in `directory`.

    Returns:
        The path of the page.

    Raises:
        UserError: no run there, `out` can't be written, or plotly is not installed (after the table).
    """
    trials = read_trials(directory)
    print_table(trials)
    link_best(directory, trials)
    try:
        from posttrain.report.page import render
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("plotly"):
            raise
        raise UserError("report: the page needs plotly, which is not installed; run `uv sync --extra sweep`") from None
    out = out or directory / "report.html"
    try:
        write_text(out, render(trials, directory.resolve().name))
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}") from None
    return out


def link_best(directory: Path, trials: list[Trial]) -> None:
    """Make `directory/best` a relative link to the export of the best finished trial; a sweep's directory only."""
    best = best_trial(trials)
    if best is None or best.export is None or best.path == directory:
        return
    aside = directory / f".best.{os.getpid()}"
    aside.symlink_to(best.export.relative_to(directory))
    aside.replace(directory / "best")
