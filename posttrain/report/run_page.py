"""The page of one run."""

import shlex
from dataclasses import dataclass

from posttrain.report.curves import axis_names, curve_names, curve_tables, describe, points_per_curve
from posttrain.report.facts import Fact, facts_of_run
from posttrain.report.page import changed_keys, is_chosen, render, tiles
from posttrain.report.trials import Trial, numbers_of, part_of
from posttrain.utils.durations import format_duration

# Heading -> the curves of a chart. Curves of no chart get one of their own, folded away.
CHARTS = {
    "Loss": ("loss", "val_loss"),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad_norm",),
    "Tokens per second": ("tokens_per_second", "supervised_tokens_per_second"),
    "Model FLOPs utilization": ("mfu", "mfu_all_logits"),
    "Seconds per step": ("step_seconds",),
    "Memory in GiB": ("memory_gib",),
}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        heading: above it.
        curves: in it.
        caption: what they show, in words.
    """

    heading: str
    curves: list[str]
    caption: str


def render_run(trial: Trial) -> str:
    """Return the page of one run."""
    charts = charts_of(trial)
    chosen, following = [], []
    for change in changed_keys(trial):
        if is_chosen(change[0], trial):
            chosen.append(change)
        else:
            following.append(change)
    return render(
        "run.html.j2",
        {
            "kind": "run",
            "trials": [{"name": trial.name, "curves": curve_tables(trial, points_per_curve([trial]))}],
            "charts": [chart.curves for chart in charts],
        },
        title=trial.name,
        trial=trial,
        facts=tiles(facts_of_run(trial)),
        ask=shlex.join(["python", "-m", "posttrain.generate", str(trial.path), "your question"]),
        axes=axis_names([trial]),
        charts=charts,
        main=sum(chart.heading in CHARTS for chart in charts),
        chosen=chosen,
        following=following,
        splits=_splits(trial),
        counts=_row_counts(trial),
        startup=_startup(trial),
    )


def charts_of(trial: Trial) -> list[Chart]:
    """The charts of one run, those of CHARTS first."""
    names = curve_names([trial], "loss")
    charts = []
    for heading, members in CHARTS.items():
        curves = [name for name in members if name in names]
        if curves:
            charts.append(_chart(trial, heading, curves))
    grouped = set().union(*CHARTS.values())
    for name in names:
        if name not in grouped:
            charts.append(_chart(trial, name, [name]))
    return charts


def _chart(trial: Trial, heading: str, curves: list[str]) -> Chart:
    """A chart with a sentence for each curve, which names it where there are several."""
    sentences = []
    for name in curves:
        words = describe(trial.series[name])
        if len(curves) > 1:
            words = f"{name}: {words[0].lower()}{words[1:]}"
        sentences.append(words)
    return Chart(heading, curves, " ".join(sentences))


def _splits(trial: Trial) -> dict[str, dict[str, float]]:
    """Training and validation rows of a run as they were counted."""
    splits = {}
    for name in ("train", "validation"):
        counted = trial.counted.get(name)
        if isinstance(counted, dict):
            splits[name] = numbers_of(counted)
    return splits


def _row_counts(trial: Trial) -> dict[str, float]:
    """What became of the rows of a run's files."""
    rows = part_of(trial.counted, "rows")
    counts = numbers_of(rows)
    for part in ("dropped", "unread"):
        for reason, value in numbers_of(part_of(rows, part)).items():
            counts[f"{part}: {reason}"] = value
    return counts


def _startup(trial: Trial) -> list[Fact]:
    """The phases before the first step."""
    phases = numbers_of(part_of(trial.summary, "startup_s"))
    return [Fact(name, format_duration(seconds)) for name, seconds in phases.items()]
