"""The figures that compare trials: a heat map of two keys, parallel coordinates of all keys."""

import math
from typing import Any

import plotly.graph_objects as go

from posttrain.config.trial_names import short
from posttrain.report.table import NUMBERS, columns, format_value
from posttrain.report.trials import Trial, ranked_by

PREFERRED_AXES = ("peft.rank", "optimizer.lr")
SCALE = "Viridis"  # dark is low, which is good
LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif"},
    "margin": {"t": 40, "b": 50},
}
LOG_RATIO = 8  # a key whose largest value is so many times its smallest gets a logarithmic axis


def heat_map(trials: list[Trial]) -> go.Figure | None:
    """Draw the ranking metric over two differing keys, the best trial in each cell.

    Returns:
        The figure; None without two keys or a result.
    """
    metric = ranked_by(trials)
    keys = columns(trials)
    if len(keys) < 2 or not with_score(trials):
        return None
    x_key, y_key = keys[:2]
    if set(PREFERRED_AXES) <= set(keys):
        x_key, y_key = PREFERRED_AXES
    xs = sort_distinct(values_of(x_key, trials))
    ys = sort_distinct(values_of(y_key, trials))
    scores: list[list[float | None]] = []
    labels: list[list[str]] = []
    for y in ys:
        scores.append([])
        labels.append([])
        for x in xs:
            best = _best_in_cell(trials, {x_key: x, y_key: y})
            if best is None:
                scores[-1].append(None)
                labels[-1].append("not tried")
                continue
            score = best.score(metric)
            scores[-1].append(score if math.isfinite(score) else None)
            labels[-1].append(f"{best.name}: {best.state}")
    figure = go.Figure(
        go.Heatmap(
            x=list(map(format_value, xs)),
            y=list(map(format_value, ys)),
            z=scores,
            customdata=labels,
            texttemplate="%{z:.4g}",
            hovertemplate="%{customdata}<br>%{z:.5g}<extra></extra>",
            colorscale=SCALE,
            colorbar={"title": NUMBERS[metric]},
            xgap=2,
            ygap=2,
        )
    )
    axis = {"type": "category", "showgrid": False}
    figure.update_layout(xaxis={"title": x_key, **axis}, yaxis={"title": y_key, **axis}, **LAYOUT)
    return figure


def parallel_coordinates(trials: list[Trial]) -> go.Figure | None:
    """Draw every differing key and the results as parallel axes.

    Returns:
        The figure; None with fewer than two results or no difference.
    """
    metric = ranked_by(trials)
    keys = columns(trials)
    trials = with_score(trials)
    if len(trials) < 2 or not keys:
        return None
    axes = []
    for key in keys:
        axes.append(_axis(short(key, keys), values_of(key, trials)))
    for name in (metric, "tokens_per_second"):
        values = [trial.summary.get(name) for trial in trials]
        if _are_numbers(values):
            axes.append({"label": NUMBERS[name], "values": values})
    scores = [trial.score(metric) for trial in trials]
    line = {"color": scores, "colorscale": SCALE, "showscale": True}
    figure = go.Figure(go.Parcoords(dimensions=axes, line=line))
    figure.update_layout(**LAYOUT | {"margin": {"t": 70, "b": 30, "l": 70}})
    return figure


def with_score(trials: list[Trial]) -> list[Trial]:
    """The trials with a result."""
    metric = ranked_by(trials)
    return [trial for trial in trials if math.isfinite(trial.score(metric))]


def values_of(key: str, trials: list[Trial]) -> list[Any]:
    """Each trial's value of a key."""
    return [trial.config.get(key) for trial in trials]


def sort_distinct(values: list[Any]) -> list[Any]:
    """Return the distinct values: numbers by size, then the rest by name."""
    numbers: dict[str, int | float] = {}
    others: dict[str, Any] = {}
    for value in values:
        kind = numbers if isinstance(value, int | float) else others
        kind[format_value(value)] = value
    return sorted(numbers.values()) + [others[name] for name in sorted(others)]


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _best_in_cell(trials: list[Trial], cell: dict[str, Any]) -> Trial | None:
    """The best of the trials whose configuration has the values of `cell`."""
    matching = []
    for trial in trials:
        if all(trial.config.get(key) == value for key, value in cell.items()):
            matching.append(trial)
    metric = ranked_by(matching)
    return min(matching, key=lambda trial: trial.score(metric), default=None)


def _axis(label: str, values: list[Any]) -> dict[str, Any]:
    """A parallel axis with a tick at each value; values that are not numbers are spaced evenly."""
    distinct = sort_distinct(values)
    numeric = _are_numbers(distinct)
    logarithmic = numeric and distinct[0] > 0 and distinct[-1] / distinct[0] >= LOG_RATIO
    positions: dict[str, float] = {}
    for index, value in enumerate(distinct):
        if logarithmic:
            position = math.log10(value)
        elif numeric:
            position = float(value)
        else:
            position = float(index)
        positions[format_value(value)] = position
    return {
        "label": label,
        "values": [positions[format_value(value)] for value in values],
        "tickvals": list(positions.values()),
        "ticktext": list(positions),
    }
