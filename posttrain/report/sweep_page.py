"""The page that compares trials."""

from dataclasses import dataclass

from posttrain.report.comparison import LARGER_IS_BETTER, Comparison, format_setting, format_value, setting
from posttrain.report.curves import axis_names, curve_names, curve_tables, describe, points_per_curve
from posttrain.report.facts import RANKING, facts_of_sweep
from posttrain.report.importance import parameter_importance
from posttrain.report.page import Changes, changed_keys, render, tiles
from posttrain.report.scales import is_quantity, key_axes, result_axis
from posttrain.report.trials import Trial, is_number
from posttrain.utils.escape import escape_control

MOST_HUES = 10  # trials told apart by hue; more are coloured by rank
MOST_SAMPLES = 20  # trials whose answers are shown: the best ones
MOST_RESULTS = 4  # numbers that colour the heat map
PARALLEL = ("tokens_per_second", "peak_memory_gib")  # results with an axis beside the one that ranks
LONGEST_ERROR = 400  # characters in the leaderboard; the whole is in a trial's details


@dataclass(frozen=True)
class Cell:
    """A cell of the leaderboard.

    Attributes:
        text: shown.
        value: sorted by; None: it stays last.
    """

    text: str
    value: object

    @property
    def is_text(self) -> bool:
        """Whether it is read from the left."""
        return isinstance(self.value, str)


@dataclass(frozen=True)
class Row:
    """A trial of the leaderboard.

    Attributes:
        rank: counted from 1.
        trial: itself.
        name: without what all names begin with.
        color: of its curve, in CSS.
        score: of what ranks.
        settings: of the swept keys.
        numbers: the other results.
        own: changes from the defaults that are neither swept nor the same in all trials.
    """

    rank: int
    trial: Trial
    name: str
    color: str
    score: Cell
    settings: list[Cell]
    numbers: list[Cell]
    own: Changes


def render_sweep(comparison: Comparison, title: str, csv: str) -> str:
    """Return the page of several trials.

    Args:
        comparison: of the trials.
        title: of the page.
        csv: the name of the file beside it that has the same numbers.
    """
    trials = comparison.trials
    changes = {trial.name: changed_keys(trial) for trial in trials}
    fixed = _fixed(comparison, changes)
    rows = _rows(comparison, changes, fixed)
    return render(
        "sweep.html.j2",
        _data(comparison, rows),
        title=title,
        comparison=comparison,
        numbers=comparison.other_numbers,
        facts=tiles(facts_of_sweep(comparison)),
        ranking=RANKING[comparison.metric],
        rows=rows,
        fixed=fixed,
        apart=len(comparison.compared) < len(trials),
        importance=parameter_importance(comparison),
        axes=axis_names(trials),
        curves_caption=_curves_caption(comparison),
        history_caption=_history_caption(comparison),
        csv=csv,
        most_samples=MOST_SAMPLES,
        longest_error=LONGEST_ERROR,
    )


def colors(comparison: Comparison) -> list[str]:
    """A CSS colour per trial: distinct hues for a few, else from good to bad; grey without a result."""
    if len(comparison.trials) <= MOST_HUES:
        return [f"var(--hue-{index})" for index in range(len(comparison.trials))]
    places = {trial.name: place for place, trial in enumerate(comparison.scored)}
    chosen = []
    for trial in comparison.trials:
        if trial.name not in places:
            chosen.append("var(--faint)")
            continue
        share = places[trial.name] / max(1, len(places) - 1)
        chosen.append(f"color-mix(in oklab, var(--bad) {share:.0%}, var(--good))")
    return chosen


def _rows(comparison: Comparison, changes: dict[str, Changes], fixed: Changes) -> list[Row]:
    aside = {key for key, _, _ in fixed} | set(comparison.keys)
    rows = []
    for rank, (trial, color) in enumerate(zip(comparison.trials, colors(comparison), strict=True), 1):
        rows.append(
            Row(
                rank=rank,
                trial=trial,
                name=comparison.names[trial.name],
                color=color,
                score=_number(trial, comparison.metric),
                settings=[_setting(trial, key) for key in comparison.keys],
                numbers=[_number(trial, name) for name in comparison.other_numbers],
                own=[change for change in changes[trial.name] if change[0] not in aside],
            )
        )
    return rows


def _number(trial: Trial, name: str) -> Cell:
    value = trial.summary.get(name)
    if not is_number(value):
        return Cell("", None)
    return Cell(format_value(value), value)


def _setting(trial: Trial, key: str) -> Cell:
    """A swept value; none of a trial whose configuration can't be read."""
    if not trial.config:
        return Cell("", None)
    value = setting(trial, key)
    text = format_setting(value)
    if is_quantity(value):
        return Cell(text, value)
    return Cell(text, text)


def _fixed(comparison: Comparison, changes: dict[str, Changes]) -> Changes:
    """The changes that all readable trials have in common."""
    readable = [changes[trial.name] for trial in comparison.trials if trial.config]
    if not readable:
        return []
    common = set(readable[0]).intersection(*readable[1:])
    return [change for change in readable[0] if change in common]


def _data(comparison: Comparison, rows: list[Row]) -> dict[str, object]:
    """What page.js draws."""
    trials = comparison.trials
    most = points_per_curve(trials)
    drawn = []
    for row in rows:
        drawn.append(
            {
                "id": row.trial.name,
                "rank": row.rank,
                "name": escape_control(row.name),
                "state": escape_control(row.trial.state),
                "color": row.color,
                "score": row.score.value,
                "curves": curve_tables(row.trial, most),
            }
        )
    ranks = {trial.name: index for index, trial in enumerate(trials)}
    return {
        "kind": "sweep",
        "metric": comparison.numbers.get(comparison.metric, comparison.metric),
        "best": ranks[comparison.best.name] if comparison.best else None,
        "trials": drawn,
        "curves": curve_names(trials, comparison.curve),
        "history": [{"trial": ranks[trial.name], "best": best} for trial, best in comparison.history],
        **_axes(comparison, ranks),
    }


def _axes(comparison: Comparison, ranks: dict[str, int]) -> dict[str, object]:
    """Axes of keys and of results, of the trials that can be compared and have a configuration."""
    trials = [trial for trial in comparison.compared if trial.config]
    if not trials:
        return {"shown": [], "keys": [], "results": []}
    results: list[dict[str, object]] = []
    for name, label in comparison.numbers.items():
        values = [_number(trial, name).value for trial in trials]
        axis = result_axis(name, label, values)
        if axis is not None and len(results) < MOST_RESULTS:
            parallel = name == comparison.metric or name in PARALLEL
            results.append({**vars(axis), "values": values, "up": name in LARGER_IS_BETTER, "parallel": parallel})
    keys = [vars(axis) for axis in key_axes(comparison, trials)]
    return {"shown": [ranks[trial.name] for trial in trials], "keys": keys, "results": results}


def _curves_caption(comparison: Comparison) -> str:
    """What the first curve shows, of the best trial."""
    best = comparison.best
    if best is None or comparison.curve not in best.series:
        return ""
    words = describe(best.series[comparison.curve])
    return f"{comparison.curve} of the best trial: {words[0].lower()}{words[1:]}"


def _history_caption(comparison: Comparison) -> str:
    """The first result and the best one in words."""
    history = comparison.history
    if not history:
        return "No trial has a result yet."
    first, best = history[0][1], history[-1][1]
    since = next(number for number, (_, value) in enumerate(history, 1) if value == best)
    return (
        f"{format_value(first)} with the first trial, {format_value(best)} since trial {since} of {len(history)}, "
        "in the order in which they were started."
    )
