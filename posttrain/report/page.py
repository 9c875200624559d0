"""The trials as one HTML file that needs neither a network nor another file."""

import json
import math
from pathlib import Path
from typing import Any

import plotly.colors
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import OmegaConf
from plotly.offline import get_plotlyjs

from posttrain.compose import compose
from posttrain.report import figures
from posttrain.report.table import NUMBERS, columns, say
from posttrain.report.trials import Trial, best_trial, ranked_by
from posttrain.sweep.names import flatten, is_place

FOLDER = Path(__file__).parent
MOST_POINTS = 1500  # per curve: more than a screen has columns, few enough for 100 trials in one file
FIRST_CURVES = ("loss", "val_loss")  # at the top of the curve menu
NOT_CURVES = ("time",)
FEW = 10  # trials told apart by hue; more are coloured by rank


def render(trials: list[Trial], title: str) -> str:
    """Return the page.

    Args:
        trials: best first.
        title: what is compared, for the heading.
    """
    defaults = flatten(OmegaConf.to_container(compose(), resolve=True))
    curves = dict.fromkeys(name for trial in trials for name in trial.series if name not in NOT_CURVES)
    data = {
        "trials": [
            {"name": trial.name, "color": color, "series": {name: _curve(trial, name) for name in curves}}
            for trial, color in zip(trials, colors(trials), strict=True)
        ],
        "curves": sorted(curves, key=lambda name: FIRST_CURVES.index(name) if name in FIRST_CURVES else 9),
        "figures": {
            name: json.loads(figure.to_json())
            for name, make in (("heat", figures.heat_map), ("parallel", figures.parallel))
            if (figure := make(trials)) is not None
        },
    }
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.j2").render(
        title=title,
        trials=[_row(trial, color["color"], defaults) for trial, color in zip(trials, data["trials"], strict=True)],
        keys=columns(trials),
        numbers={key: NUMBERS[key] for key in NUMBERS if any(key in trial.summary for trial in trials)},
        metric=ranked_by(trials),
        best=best_trial(trials),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # so that no text can end the script
        figures=data["figures"],
        say=say,
        value=lambda value: json.dumps(value, ensure_ascii=False),
        plotly=get_plotlyjs(),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
    )


def colors(trials: list[Trial]) -> list[str]:
    """A colour per trial: distinct hues for a few, else from good to bad, and grey without a result."""
    if len(trials) <= FEW:
        return plotly.colors.qualitative.D3[: len(trials)]
    count = len(figures.scored(trials))
    good = plotly.colors.sample_colorscale("Viridis", [0.88 * i / max(1, count - 1) for i in range(count)])
    return good + ["#9aa5b1"] * (len(trials) - count)  # the scale's last part is too pale on white


def _row(trial: Trial, color: str, defaults: dict[str, Any]) -> dict[str, Any]:
    changed = [
        (key, defaults.get(key), trial.config.get(key))
        for key in dict.fromkeys([*trial.config, *defaults])
        if not is_place(key) and trial.config.get(key) != defaults.get(key)
    ]
    return {"trial": trial, "color": color, "changed": changed}


def _curve(trial: Trial, name: str) -> dict[str, list[float]]:
    """Points of a curve, thinned evenly; the last is kept. `minutes` counts from the trial's first line."""
    points = trial.series.get(name, [])
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    points = points[::-1][::stride][::-1]
    clock = dict(trial.series.get("time", []))
    start = min(clock.values(), default=0.0)
    return {
        "step": [step for step, _ in points],
        "minutes": [round((clock.get(step, start) - start) / 60, 4) for step, _ in points],
        "value": [float(f"{value:.6g}") for _, value in points],
    }
