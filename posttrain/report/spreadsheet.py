"""A CSV file of the trials, for spreadsheets and notebooks."""

import csv
import io

from posttrain.report.comparison import NUMBERS, Comparison, format_setting, setting
from posttrain.utils.escape import escape_control

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a text that begins so would be computed by a spreadsheet


def csv_text(comparison: Comparison) -> str:
    """One line a trial, best first: rank, name, state, error, swept values, numbers of the summary, seconds, path."""
    numbers = [name for name in NUMBERS if name in comparison.numbers]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_text, ["rank", "trial", "state", "error", *comparison.keys, *numbers, "seconds", "path"]))
    for rank, trial in enumerate(comparison.trials, 1):
        values: list[object] = (
            [setting(trial, key) for key in comparison.keys] if trial.config else [""] * len(comparison.keys)
        )
        results = [trial.summary.get(name, "") for name in numbers]
        cells = [trial.name, trial.state, trial.error, *values, *results, round(trial.seconds, 1), str(trial.path)]
        writer.writerow([rank, *map(_cell, cells)])
    return file.getvalue()


def _cell(value: object) -> object:
    """Numbers exactly, texts harmless."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return _text(format_setting(value))


def _text(text: str) -> str:
    text = escape_control(text)
    return f"'{text}" if text.startswith(FORMULA) else text
