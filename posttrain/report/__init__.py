"""The results of a sweep, or of one run: facts in the terminal, a page, a link to the best export.

Everything is read from the run directories, so a report can be made at any time, also while trials
are still running.
"""

import os
import sys
from pathlib import Path

from posttrain.errors import UserError
from posttrain.report.comparison import Comparison, compare
from posttrain.report.spreadsheet import csv_text
from posttrain.report.table import print_run, print_table
from posttrain.report.trials import read_trials
from posttrain.utils import rundir, working
from posttrain.utils.atomic_files import write_text

PAGE = "report.html"
TABLE = ".csv"


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Print the facts of the runs in `directory`, write the page, and link to the best export.

    Args:
        directory: of a sweep, or of a run. In a sweep's, a CSV file is written beside the page, and `best` becomes
            the link.
        out: the page; None: report.html in `directory`.

    Returns:
        The path of the page.

    Raises:
        UserError: no run there, or `out` can't be written.
    """
    from posttrain.report.run_page import render_run  # templates, which a trial and a run don't need
    from posttrain.report.sweep_page import render_sweep

    trials = read_trials(directory)
    working.phase("drawing the page")
    page = out or directory / PAGE
    if page.suffix == TABLE or not page.name:
        raise UserError(f"--out {page}: is not the name of a page; the table beside it ends in {TABLE}: --out my.html")
    if trials[0].path == directory:
        print_run(trials[0])
        _write(directory, page, render_run(trials[0]))
        return page
    comparison = compare(trials)
    print_table(comparison)
    try:
        link_best(directory, comparison)
    except UserError as error:  # the page can be made all the same
        print(f"posttrain: {error}", file=sys.stderr)
    table = page.with_suffix(TABLE)
    _write(directory, page, render_sweep(comparison, directory.resolve().name, table.name))
    _write(directory, table, csv_text(comparison))
    return page


def link_best(directory: Path, comparison: Comparison) -> None:
    """Make `directory/best` a relative link to the export of the best finished trial.

    Raises:
        UserError: something else than a link has the name, or the directory can't be written.
    """
    best = comparison.best
    if best is None or best.export is None:
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


def _write(directory: Path, path: Path, text: str) -> None:
    """A file of the report; in the run directory nothing that isn't a file of this name is written through."""
    try:
        if path.parent == directory:
            rundir.write_text(directory, path.name, text)
        else:
            write_text(path, text)
    except OSError as error:
        advice = "choose another place for the page: --out PAGE"
        raise UserError(f"{path}: can't be written: {error.strerror}; {advice}") from None
