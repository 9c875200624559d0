"""The trials as one HTML file that requires neither a network nor a second file."""

import json
import math
from pathlib import Path
from typing import Any

import plotly.colors
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from posttrain.config.composition import compose
from posttrain.config.containers import as_dict
from posttrain.config.trial_names import flatten, is_run_local
from posttrain.report import figures
from posttrain.report.table import NUMBERS, columns, format_value, numbers_of
from posttrain.report.trials import Trial, best_trial, ranked_by
from posttrain.utils.escape import escape_control

FOLDER = Path(__file__).parent
MOST_POINTS = 1500  # per curve: more than a screen has columns, few enough for 100 trials in one file
FIRST_CURVES = ("loss", "val_loss")  # at the top of the curve menu
NOT_CURVES = ("time",)
MOST_HUES = 10  # trials told apart by hue; more are coloured by rank


def _escaped(value: object) -> object:
    """A text of a run with its control characters made visible; markup is left as it is."""
    return escape_control(value) if type(value) is str else value


def render(trials: list[Trial], title: str) -> str:
    """Return the page.

    Args:
        trials: best first.
        title: what is compared, for the heading.
    """
    defaults = flatten(as_dict(compose()))
    compared = [trial for trial in trials if trial.group == 0]
    curves = curve_names(trials)
    rows, curves_by_trial = [], []
    for trial, color in zip(trials, colors(trials), strict=True):
        changed = changed_keys(trial.config, defaults)
        rows.append({"trial": trial, "color": color, "changed": changed})
        series = {name: _curve(trial, name) for name in curves}
        curves_by_trial.append({"name": trial.name, "color": color, "series": series})
    data = {"trials": curves_by_trial, "curves": curves, "figures": draw_figures(compared)}
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_escaped
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        trials=rows,
        keys=columns(trials),
        apart=len(compared) < len(trials),
        numbers={name: NUMBERS[name] for name in numbers_of(trials)},
        metric=ranked_by(trials),
        best=best_trial(trials),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # so that no text can end the script
        figures=data["figures"],
        format_value=format_value,
        value=lambda value: json.dumps(value, ensure_ascii=False),
        plotly=get_plotlyjs(),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
    )


def curve_names(trials: list[Trial]) -> list[str]:
    """The metrics that any trial has a curve of, in the order of the curve menu."""
    names: dict[str, None] = {}
    for trial in trials:
        names |= dict.fromkeys(trial.series)
    first = [name for name in FIRST_CURVES if name in names]
    return first + [name for name in names if name not in (*FIRST_CURVES, *NOT_CURVES)]


def draw_figures(trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """Name in page.html.j2 -> plotly's description; figures that can't be drawn are left out."""
    drawn = {}
    for name, draw in (
        ("heat", figures.heat_map),
        ("parallel", figures.parallel_coordinates),
    ):
        figure = draw(trials)
        if figure is not None:
            drawn[name] = json.loads(figure.to_json())
    return drawn


def colors(trials: list[Trial]) -> list[str]:
    """A colour per trial: distinct hues for a few, else from good to bad; grey without a result."""
    if len(trials) <= MOST_HUES:
        return plotly.colors.qualitative.D3[: len(trials)]
    count = len(figures.with_score(trials))
    points = [0.88 * i / max(1, count - 1) for i in range(count)]  # beyond is too pale on white
    good = plotly.colors.sample_colorscale("Viridis", points)
    return good + ["#9aa5b1"] * (len(trials) - count)


def changed_keys(config: dict[str, Any], defaults: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, default, value) of every key that differs, those of where a run is run aside; none of an unreadable one."""
    changed: list[tuple[str, Any, Any]] = []
    if not config:
        return changed
    for key in dict.fromkeys([*config, *defaults]):
        if not is_run_local(key) and config.get(key) != defaults.get(key):
            changed.append((key, defaults.get(key), config.get(key)))
    return changed


def _curve(trial: Trial, name: str) -> dict[str, list[float]]:
    """Points of a curve, thinned evenly; the last one stays.

    `minutes` counts from the trial's first line; a clock that was set back meanwhile stands still.
    """
    points = trial.series.get(name, [])
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    points = points[::-1][::stride][::-1]
    passed: dict[float, float] = {}  # step -> seconds
    total = 0.0
    before = None
    for step, time in trial.series.get("time", []):
        if before is not None:
            total += max(0.0, time - before)
        passed[step] = total
        before = time
    return {
        "step": [step for step, _ in points],
        "minutes": [round(passed.get(step, 0.0) / 60, 4) for step, _ in points],
        "value": [float(f"{value:.6g}") for _, value in points],
    }
