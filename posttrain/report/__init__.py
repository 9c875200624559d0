"""The results of a sweep, or of one run: a table in the terminal, a page, a link to the best export.

Everything is read from the run directories, so a report can be made at any time, also while trials
are still running.
"""

import os
import sys
from pathlib import Path

from posttrain.errors import UserError
from posttrain.report.table import print_table
from posttrain.report.trials import Trial, best_trial, read_trials
from posttrain.utils import rundir
from posttrain.utils.atomic_files import write_text

PAGE = "report.html"


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
    try:
        link_best(directory, trials)
    except UserError as error:  # the page can be made all the same
        print(f"posttrain: {error}", file=sys.stderr)
    try:
        from posttrain.report.page import render
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("plotly"):
            raise
        raise UserError(
            "report: the page requires plotly, which is not installed; run `uv sync --extra sweep`"
        ) from None
    page = render(trials, directory.resolve().name)
    try:
        if out is None:
            rundir.write_text(directory, PAGE, page)
        else:
            write_text(out, page)
    except OSError as error:
        raise UserError(f"{out or directory / PAGE}: can't be written: {error.strerror}") from None
    return out or directory / PAGE


def link_best(directory: Path, trials: list[Trial]) -> None:
    """Make `directory/best` a relative link to the export of the best finished trial.

    A run's own directory gets none.

    Raises:
        UserError: something else than a link has the name, or the directory can't be written.
    """
    best = best_trial(trials)
    if best is None or best.export is None or best.path == directory:
        return
    link = directory / "best"
    if os.path.lexists(link) and not link.is_symlink():
        raise UserError(f"{link}: is no link; the report puts a link to the best export there; rename it")
    scratch = directory / f".best.{os.urandom(4).hex()}"
    try:
        scratch.symlink_to(best.export.relative_to(directory))
        scratch.replace(link)
    except OSError as error:
        raise UserError(f"{link}: can't be written: {error.strerror}") from None
