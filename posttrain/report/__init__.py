"""The results of a sweep, or of one run: a table in the terminal, a page, a link to the best export.

Everything is read from the run directories, so a report can be made at any time, also while trials
are still running.
"""

import os
from pathlib import Path

from posttrain.errors import UserError
from posttrain.files import write_text
from posttrain.report.table import print_table
from posttrain.report.trials import Trial, best_trial, read_trials


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Print the table of the runs in `directory`, write the page, and link to the best export.

    Args:
        directory: of a sweep, or of a run. In a sweep's, `best` becomes the link.
        out: the page; None: report.html in `directory`.

    Returns:
        The path of the page.

    Raises:
        UserError: no run there, `out` can't be written, or plotly is not installed (after the
            table).
    """
    trials = read_trials(directory)
    print_table(trials)
    link_best(directory, trials)
    try:
        from posttrain.report.page import render
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("plotly"):
            raise
        raise UserError(
            "report: the page requires plotly, which is not installed; run `uv sync --extra sweep`"
        ) from None
    out = out or directory / "report.html"
    try:
        write_text(out, render(trials, directory.resolve().name))
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}") from None
    return out


def link_best(directory: Path, trials: list[Trial]) -> None:
    """Make `directory/best` a relative link to the export of the best finished trial.

    A run's own directory gets none.
    """
    best = best_trial(trials)
    if best is None or best.export is None or best.path == directory:
        return
    scratch = directory / f".best.{os.getpid()}"
    scratch.symlink_to(best.export.relative_to(directory))
    scratch.replace(directory / "best")
