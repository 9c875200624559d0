"""Reports as HTML files that require neither a network nor a second file."""

import base64
import hashlib
import json
import shlex
import time
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from posttrain.config.composition import compose
from posttrain.config.containers import as_dict
from posttrain.config.trial_names import flatten, is_run_local
from posttrain.report.comparison import (
    LARGER_IS_BETTER,
    Comparison,
    format_setting,
    format_value,
    setting,
)
from posttrain.report.curves import curve_names, curve_tables, describe, points_per_curve
from posttrain.report.facts import RANKING, Fact, facts_of_run, facts_of_sweep
from posttrain.report.importance import parameter_importance
from posttrain.report.scales import key_axes, result_axis
from posttrain.report.trials import Trial, is_number
from posttrain.utils.durations import format_duration
from posttrain.utils.escape import escape_control, shorten

FOLDER = Path(__file__).parent
MOST_HUES = 10  # trials told apart by hue; more are coloured by rank
MOST_SAMPLES = 20  # trials whose answers are shown: the best ones
MOST_RESULTS = 4  # numbers that are axes beside the keys
PROSE = 400  # characters of an error in the leaderboard; the whole is below
# Charts of one run: heading -> the curves in it. Curves of no chart get one of their own.
CHARTS = {
    "Loss": ("loss", "val_loss"),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad_norm",),
    "Tokens per second": ("tokens_per_second", "supervised_tokens_per_second"),
    "Model FLOPs utilization": ("mfu", "mfu_all_logits"),
    "Seconds per step": ("step_seconds",),
}
Changes = list[tuple[str, str, str]]  # (key, default, value)


def render_sweep(comparison: Comparison, title: str, csv: str) -> str:
    """Return the page of several trials.

    Args:
        comparison: of the trials.
        title: of the page.
        csv: the name of the file beside it that has the same numbers.
    """
    trials = comparison.trials
    defaults = _defaults()
    changed = {trial.name: changed_keys(trial, defaults) for trial in trials}
    fixed = _fixed(comparison, changed)
    common = set(fixed)
    most = points_per_curve(trials)
    rows = []
    drawn = []
    for rank, (trial, color) in enumerate(zip(trials, colors(comparison), strict=True), 1):
        own = [change for change in changed[trial.name] if change not in common and change[0] not in comparison.keys]
        rows.append({"rank": rank, "trial": trial, "color": color, "own": own})
        drawn.append(
            {
                "id": trial.name,
                "rank": rank,
                "name": escape_control(comparison.names[trial.name]),
                "state": escape_control(trial.state),
                "color": color,
                "score": _number(trial.summary.get(comparison.metric)),
                "curves": curve_tables(trial, most),
            }
        )
    curves = curve_names(trials, comparison.curve)
    data = {
        "kind": "sweep",
        "metric": comparison.numbers.get(comparison.metric, comparison.metric),
        "trials": drawn,
        "curves": curves,
        "history": _history(comparison),
        **_scales(comparison),
    }
    captions = {"curves": _curves_caption(comparison), "history": _history_caption(comparison)}
    return _render(
        "sweep.html.j2",
        data,
        title=title,
        comparison=comparison,
        facts=_tiles(facts_of_sweep(comparison)),
        ranking=RANKING[comparison.metric],
        rows=rows,
        fixed=fixed,
        apart=len(comparison.compared) < len(trials),
        importance=parameter_importance(comparison),
        captions=captions,
        csv=csv,
        is_text=lambda value: isinstance(value, str),
        swept=setting,
        most_samples=MOST_SAMPLES,
        prose=PROSE,
    )


def render_run(trial: Trial) -> str:
    """Return the page of one run."""
    charts = run_charts(trial)
    data = {
        "kind": "run",
        "trials": [{"name": trial.name, "curves": curve_tables(trial, points_per_curve([trial]))}],
        "charts": [chart["curves"] for chart in charts],
    }
    chosen: Changes = []
    following: Changes = []
    for change in changed_keys(trial, _defaults()):
        (chosen if _is_chosen(change[0], trial) else following).append(change)
    return _render(
        "run.html.j2",
        data,
        title=trial.name,
        trial=trial,
        facts=_tiles(facts_of_run(trial)),
        ask=shlex.join(["python", "-m", "posttrain.generate", str(trial.path), "your question"]),
        charts=charts,
        chosen=chosen,
        following=following,
        splits=_splits(trial),
        counts=_counts(trial),
        startup=_startup(trial),
    )


def _tiles(facts: list[Fact]) -> list[Fact]:
    """Those that the page doesn't say elsewhere: state and export."""
    return [fact for fact in facts if not fact.name.endswith(("export", "state"))]


def run_charts(trial: Trial) -> list[dict[str, Any]]:
    """The charts of one run: heading, curves, and what they show in words."""
    names = curve_names([trial], "loss")
    groups = {heading: [name for name in curves if name in names] for heading, curves in CHARTS.items()}
    known = {name for curves in groups.values() for name in curves}
    groups |= {name: [name] for name in names if name not in known}
    charts = []
    for heading, curves in groups.items():
        if not curves:
            continue
        described = []
        for name in curves:
            words = describe(trial.series[name])
            described.append(words if len(curves) == 1 else f"{name}: {words[0].lower()}{words[1:]}")
        charts.append({"heading": heading, "curves": curves, "caption": " ".join(described), "main": heading in CHARTS})
    return charts


def colors(comparison: Comparison) -> list[str]:
    """A CSS colour per trial: distinct hues for a few, else from good to bad; grey without a result."""
    if len(comparison.trials) <= MOST_HUES:
        return [f"var(--hue-{index})" for index in range(len(comparison.trials))]
    scored = [trial.name for trial in comparison.scored]
    chosen = []
    for trial in comparison.trials:
        if trial.name not in scored:
            chosen.append("var(--faint)")
            continue
        share = scored.index(trial.name) / max(1, len(scored) - 1)
        chosen.append(f"color-mix(in oklab, var(--bad) {share:.0%}, var(--good))")
    return chosen


def changed_keys(trial: Trial, defaults: dict[str, Any]) -> Changes:
    """What differs from the defaults, where a run is run aside: that of the command line first.

    Keys of the defaults that the configuration doesn't have belong to a group's other choice and are left out.
    """
    changed: Changes = []
    for key, value in trial.config.items():
        if not is_run_local(key) and value != defaults.get(key):
            default = format_setting(defaults[key]) if key in defaults else ""
            changed.append((key, default, format_setting(value)))
    for key, text in trial.choices.items():
        if key not in trial.config and "." not in key and not is_run_local(key):  # a group: the file that was chosen
            changed.append((key, "", text))
    return sorted(changed, key=lambda change: not _is_chosen(change[0], trial))


def _is_chosen(key: str, trial: Trial) -> bool:
    """Whether the command line says it: itself, or a mapping that it is in."""
    parts = key.split(".")
    above = [".".join(parts[:length]) for length in range(2, len(parts))]
    return key in trial.choices or any(name in trial.choices for name in above)


@cache
def _defaults() -> dict[str, Any]:
    return flatten(as_dict(compose()))


def _fixed(comparison: Comparison, changed: dict[str, Changes]) -> Changes:
    """The changes that all readable trials have in common."""
    readable = [changed[trial.name] for trial in comparison.trials if trial.config]
    if not readable:
        return []
    common = set(readable[0]).intersection(*readable[1:])
    return [change for change in readable[0] if change in common]


def _scales(comparison: Comparison) -> dict[str, object]:
    """Axes of keys and of results, of the trials that can be compared and have a configuration."""
    trials = [trial for trial in comparison.compared if trial.config]
    results = []
    for name, label in comparison.numbers.items():
        axis = result_axis(name, label, [trial.summary.get(name) for trial in trials])
        if axis is not None:
            numbers = [_number(trial.summary.get(name)) for trial in trials]
            results.append({**vars(axis), "values": numbers, "up": name in LARGER_IS_BETTER})
    ranks = [comparison.trials.index(trial) for trial in trials]
    keys = [vars(axis) for axis in key_axes(comparison, trials)] if trials else []
    return {"shown": ranks, "keys": keys, "results": results[:MOST_RESULTS]}


def _number(value: object) -> float | None:
    return value if is_number(value) else None


def _history(comparison: Comparison) -> list[dict[str, object]]:
    history: list[dict[str, object]] = []
    for trial, best in comparison.history:
        history.append({"trial": comparison.trials.index(trial), "best": best})
    return history


def _curves_caption(comparison: Comparison) -> str:
    """What the first curve shows, of the best trial."""
    best = comparison.best
    if best is None or comparison.curve not in best.series:
        return ""
    words = describe(best.series[comparison.curve])
    return f"{comparison.curve} of the best trial: {words[0].lower()}{words[1:]}"


def _history_caption(comparison: Comparison) -> str:
    """The improvements in words."""
    improvements = []
    for number, (trial, best) in enumerate(comparison.history, 1):
        if trial.score(comparison.metric) == best:
            improvements.append((number, best))
    if not improvements:
        return ""
    number, best = improvements[-1]
    first = format_value(improvements[0][1])
    return (
        f"{first} with the first trial, {format_value(best)} since trial {number} of {len(comparison.history)}, "
        f"in the order in which they were started."
    )


def _splits(trial: Trial) -> dict[str, dict[str, Any]]:
    """Training and validation rows of a run as they were counted."""
    counted = trial.summary.get("data")
    if not isinstance(counted, dict):
        return {}
    splits = {}
    for name in ("train", "validation"):
        if isinstance(counted.get(name), dict):
            splits[name] = {key: value for key, value in counted[name].items() if is_number(value)}
    return splits


def _counts(trial: Trial) -> dict[str, float]:
    """What became of the rows of a run's files."""
    counted = trial.summary.get("data")
    rows = counted.get("rows") if isinstance(counted, dict) else None
    if not isinstance(rows, dict):
        return {}
    counts = {name: value for name, value in rows.items() if is_number(value)}
    for part in ("dropped", "unread"):
        reasons = rows.get(part)
        if isinstance(reasons, dict):
            counts |= {f"{part}: {reason}": value for reason, value in reasons.items() if is_number(value)}
    return counts


def _startup(trial: Trial) -> list[Fact]:
    """The phases before the first step."""
    phases = trial.summary.get("startup_s")
    if not isinstance(phases, dict):
        return []
    return [Fact(str(name), format_duration(value)) for name, value in phases.items() if is_number(value)]


def _render(template: str, data: dict[str, Any], **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # so that no text can end the script
        script=script,
        script_hash=f"sha256-{digest}",
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        format_value=format_value,
        format_setting=format_setting,
        format_duration=format_duration,
        shorten=shorten,
        **values,
    )


def _escaped(value: object) -> object:
    """A text or path of a run with its control characters made visible; markup is left as it is."""
    if isinstance(value, Path):
        value = str(value)
    return escape_control(value) if type(value) is str else value
