"""Curves of runs for a page: few enough points for a file that opens at once, and captions with their numbers."""

import math

from posttrain.report.comparison import format_value
from posttrain.report.trials import Trial

MOST_POINTS = 1500  # per curve: more than a screen has columns
ALL_POINTS = 80_000  # of a page, shared by its curves: a megabyte
FEWEST_POINTS = 20
AXES = ("epoch", "tokens")  # what else than step and minutes a curve may be drawn over
NOT_CURVES = ("time", *AXES)

Points = list[tuple[int, float]]
Table = dict[str, object]  # {"step": [...], "minutes": [...], "tokens": [...], "values": {curve: [...]}}


def curve_names(trials: list[Trial], first: str) -> list[str]:
    """The metrics that any trial has a curve of: what ranks the trials, training loss, the others as they came."""
    recorded = _recorded(trials)
    ordered = dict.fromkeys([first, "loss", "val_loss", *recorded])
    return [name for name in ordered if name in recorded and name not in NOT_CURVES]


def axis_names(trials: list[Trial]) -> list[str]:
    """What the curves of these trials can be drawn over."""
    recorded = _recorded(trials)
    return ["step", "minutes", *(name for name in AXES if name in recorded)]


def _recorded(trials: list[Trial]) -> dict[str, None]:
    """The names in any trial's metrics, as they came."""
    names: dict[str, None] = {}
    for trial in trials:
        names |= dict.fromkeys(trial.series)
    return names


def points_per_curve(trials: list[Trial]) -> int:
    """How many points each curve of these trials may have in one page."""
    curves = sum(len(trial.series) for trial in trials)
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, curves)))


def curve_tables(trial: Trial, most: int) -> list[Table]:
    """The curves of a run, thinned evenly to `most` points with the last one; those at the same steps in one table.

    `minutes` counts from the first line of the run; a clock that was set back meanwhile stands still. A table that has
    steps without a count of epochs or tokens lacks that axis.
    """
    passed = _seconds_passed(trial.series.get("time", []))
    by_steps: dict[tuple[int, ...], dict[str, list[float]]] = {}
    for name, points in trial.series.items():
        if name in NOT_CURVES:
            continue
        steps, values = zip(*thinned(points, most), strict=True)
        by_steps.setdefault(steps, {})[name] = [float(f"{value:.5g}") for value in values]
    tables: list[Table] = []
    for steps, curves in by_steps.items():
        minutes = [round(passed.get(step, 0.0) / 60, 3) for step in steps]
        table: Table = {"step": list(steps), "minutes": minutes, "values": curves}
        for name in AXES:
            counted = dict(trial.series.get(name, []))
            if counted.keys() >= set(steps):
                table[name] = [counted[step] for step in steps]
        tables.append(table)
    return tables


def thinned(points: Points, most: int) -> Points:
    """Every n-th point from the last one backwards, so that `most` are left."""
    stride = max(1, math.ceil(len(points) / most))
    return points[::-1][::stride][::-1]


def describe(points: Points) -> str:
    """A curve in words: where it begins, ends, and is lowest and highest."""
    first_step, first = points[0]
    last_step, last = points[-1]
    if len(points) == 1:
        return f"{format_value(first)} at step {first_step}."
    low_step, low = min(points, key=lambda point: point[1])
    high_step, high = max(points, key=lambda point: point[1])
    text = f"From {format_value(first)} at step {first_step} to {format_value(last)} at step {last_step}"
    if low_step not in (first_step, last_step):
        text += f"; lowest {format_value(low)} at step {low_step}"
    if high_step not in (first_step, last_step):
        text += f"; highest {format_value(high)} at step {high_step}"
    return f"{text}."


def _seconds_passed(times: Points) -> dict[int, float]:
    """Step -> seconds since the first line."""
    passed: dict[int, float] = {}
    total = 0.0
    before = None
    for step, time in times:
        if before is not None:
            total += max(0.0, time - before)
        passed[step] = total
        before = time
    return passed
