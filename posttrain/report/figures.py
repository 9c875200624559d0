"""The figures that compare trials: a heat map of two keys, parallel coordinates of all."""

import math
from typing import Any

import plotly.graph_objects as go

from posttrain.report.table import NUMBERS, columns, say
from posttrain.report.trials import Trial, ranked_by
from posttrain.sweep.names import short

PAIR = ("peft.rank", "optimizer.lr")  # the axes of choice, where they differ
SCALE = "Viridis"  # dark is low, which is good
LAYOUT = {"template": "plotly_white", "font": {"family": "system-ui, sans-serif"}, "margin": {"t": 40, "b": 50}}
WIDE = 8  # a key whose largest value is so many times its smallest gets a logarithmic axis


def heat_map(trials: list[Trial]) -> go.Figure | None:
    """The ranking metric over two differing keys, the best trial of each cell; None without two keys or a result."""
    metric, keys = ranked_by(trials), columns(trials)
    if len(keys) < 2 or not scored(trials):
        return None
    across, up = PAIR if set(PAIR) <= set(keys) else keys[:2]
    xs, ys = (ordered([trial.config.get(key) for trial in trials]) for key in (across, up))
    cells = [[_best([t for t in trials if (t.config.get(across), t.config.get(up)) == (x, y)]) for x in xs] for y in ys]
    figure = go.Figure(
        go.Heatmap(
            x=[say(x) for x in xs],
            y=[say(y) for y in ys],
            z=[[None if t is None or math.isinf(t.score(metric)) else t.score(metric) for t in row] for row in cells],
            customdata=[[f"{t.name}: {t.state}" if t else "not tried" for t in row] for row in cells],
            texttemplate="%{z:.4g}",
            hovertemplate="%{customdata}<br>%{z:.5g}<extra></extra>",
            colorscale=SCALE,
            colorbar={"title": NUMBERS[metric]},
            xgap=2,
            ygap=2,
        )
    )
    axis = {"type": "category", "showgrid": False}
    figure.update_layout(xaxis={"title": across, **axis}, yaxis={"title": up, **axis}, **LAYOUT)
    return figure


def parallel(trials: list[Trial]) -> go.Figure | None:
    """Every differing key and the results as parallel axes; None with fewer than two results or no difference."""
    metric, keys, trials = ranked_by(trials), columns(trials), scored(trials)
    if len(trials) < 2 or not keys:
        return None
    axes = [_axis(short(key, keys), [trial.config.get(key) for trial in trials]) for key in keys]
    for name in (metric, "tokens_per_second"):
        values = [trial.summary.get(name) for trial in trials]
        if all(isinstance(value, int | float) for value in values):
            axes.append({"label": NUMBERS[name], "values": values})
    line = {"color": [trial.score(metric) for trial in trials], "colorscale": SCALE, "showscale": True}
    figure = go.Figure(go.Parcoords(dimensions=axes, line=line))
    figure.update_layout(**LAYOUT | {"margin": {"t": 70, "b": 30, "l": 70}})
    return figure


def scored(trials: list[Trial]) -> list[Trial]:
    """The trials with a result."""
    return [trial for trial in trials if math.isfinite(trial.score(ranked_by(trials)))]


def ordered(values: list[Any]) -> list[Any]:
    """The distinct values: numbers by size, then the rest by name."""
    distinct = list({say(value): value for value in values}.values())
    return sorted(distinct, key=lambda v: (0, v, "") if isinstance(v, int | float) else (1, 0, say(v)))


def _best(trials: list[Trial]) -> Trial | None:
    metric = ranked_by(trials)
    return min(trials, key=lambda trial: trial.score(metric), default=None)


def _axis(label: str, values: list[Any]) -> dict[str, Any]:
    """A parallel axis whose ticks are the values that were tried; other than numbers are spaced evenly."""
    tried = ordered(values)
    if not all(isinstance(value, int | float) for value in tried):
        place = {say(value): float(i) for i, value in enumerate(tried)}
    elif tried[0] > 0 and tried[-1] / tried[0] >= WIDE:
        place = {say(value): math.log10(value) for value in tried}
    else:
        place = {say(value): float(value) for value in tried}
    return {
        "label": label,
        "values": [place[say(value)] for value in values],
        "tickvals": list(place.values()),
        "ticktext": list(place),
    }
