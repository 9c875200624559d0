"""What a report says of several trials: their ranking, what was swept, what all share, what it took."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from posttrain.config.trial_names import is_run_local, short
from posttrain.report.trials import Trial

# What trials are ranked by, the first that any of them has; smaller is better. summary.json's key -> its curve.
RANKED_BY = {"val_loss_after": "val_loss", "train_loss": "loss"}
# summary.json's key -> heading.
NUMBERS = {
    "val_loss_after": "val loss",
    "train_loss": "train loss",
    "tokens_per_second": "tok/s",
    "supervised_tokens_per_second": "supervised tok/s",
    "peak_memory_gib": "GiB",
    "train_seconds": "training seconds",
    "val_loss_before": "val loss before",
}
LARGER_IS_BETTER = ("tokens_per_second", "supervised_tokens_per_second")
MOST_NAMED = 6  # trials that are named beside an error that they share
MOST_KEYS = 12  # that are columns
# Keys, or what they begin with, whose columns come first, in this order.
FIRST = ("optimizer.lr", "peft.rank", "model", "peft", "optimizer")


@dataclass(frozen=True)
class Comparison:
    """Trials side by side.

    Attributes:
        trials: best first, those that can be compared with the latest before others.
        metric: summary.json's key that ranks them.
        best: the finished trial with the smallest metric, of the latest that can be compared; None without a result.
        keys: the swept keys, those of FIRST before others in the order of the command line.
        following: other keys that differ: what a swept group brings along.
        labels: key -> a short name that is its own.
        names: a trial's name -> without what all names begin with.
    """

    trials: list[Trial]
    metric: str
    best: Trial | None
    keys: list[str]
    following: list[str]
    labels: dict[str, str]
    names: dict[str, str]

    @property
    def numbers(self) -> dict[str, str]:
        """NUMBERS that any trial has, what ranks them first."""
        numbers = {}
        for name in (self.metric, *NUMBERS):
            if any(name in trial.summary for trial in self.trials):
                numbers[name] = NUMBERS[name]
        return numbers

    @property
    def other_numbers(self) -> list[str]:
        """Those that don't rank them."""
        return [name for name in self.numbers if name != self.metric]

    @property
    def curve(self) -> str:
        """The curve of what ranks them."""
        return RANKED_BY[self.metric]

    @property
    def columns_say_names(self) -> bool:
        """Whether the trials' folders are called what the swept values say: `lr=0.0001,rank=8`."""
        for trial in self.trials:
            for label in self.labels.values():
                if f"{label}=" not in trial.path.name:
                    return False
        return bool(self.labels)

    @property
    def compared(self) -> list[Trial]:
        """The trials that can be compared with the latest."""
        return [trial for trial in self.trials if trial.group == 0]

    @property
    def scored(self) -> list[Trial]:
        """Of those the ones with a result, best first."""
        return [trial for trial in self.compared if math.isfinite(trial.score(self.metric))]

    @property
    def states(self) -> dict[str, int]:
        """State -> how many trials, the most frequent first."""
        return dict(Counter(trial.state for trial in self.trials).most_common())

    @property
    def errors(self) -> dict[tuple[str, str], list[int]]:
        """(state, first line of the error) -> the ranks of the trials that have it, counted from 1."""
        errors: dict[tuple[str, str], list[int]] = {}
        for rank, trial in enumerate(self.trials, 1):
            text = trial.error.strip()
            if text:
                errors.setdefault((trial.state, text.splitlines()[0]), []).append(rank)
        return errors

    def which(self, ranks: list[int]) -> str:
        """`trial 3, rank=8`, `trials 3, 4`, `trials 3, 4, 5, 6, 7, 8 and 12 others`."""
        if len(ranks) == 1:
            return f"trial {ranks[0]}, {self.names[self.trials[ranks[0] - 1].name]}"
        text = ", ".join(map(str, ranks[:MOST_NAMED]))
        if len(ranks) > MOST_NAMED:
            text += f" and {len(ranks) - MOST_NAMED} others"
        return f"trials {text}"

    @property
    def seconds(self) -> float:
        """What all trials took together."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def gpu_hours(self) -> float | None:
        """Time times GPUs, None where no trial says that it ran on any."""
        known = [trial.seconds * trial.gpus / 3600 for trial in self.trials if trial.gpus]
        return sum(known) if known else None

    @property
    def tokens(self) -> int:
        """Tokens that were trained on."""
        return sum(trial.tokens for trial in self.trials)

    @property
    def history(self) -> list[tuple[Trial, float]]:
        """The compared trials with a result as they were started, each with the best metric so far."""
        history = []
        best = math.inf
        for trial in sorted(self.scored, key=lambda trial: (trial.started, trial.name)):
            best = min(best, trial.score(self.metric))
            history.append((trial, best))
        return history


def compare(trials: list[Trial]) -> Comparison:
    """Rank trials and find what was swept."""
    metric = ranking_metric(trials)
    ranked = sorted(trials, key=lambda trial: (trial.group, trial.score(metric)))  # stable: by name where equal
    finished = [trial for trial in ranked if trial.state == "finished" and trial.group == 0]
    best = finished[0] if finished and math.isfinite(finished[0].score(metric)) else None
    different = differing(trials)
    keys = swept(trials)
    if any(trial.config and trial.overrides is None for trial in trials):  # made by hand: nothing says what was meant
        keys = list(dict.fromkeys([*keys, *different]))
    keys = sorted(keys, key=_place)[:MOST_KEYS]
    columns = set(keys)
    return Comparison(
        trials=ranked,
        metric=metric,
        best=best,
        keys=keys,
        following=[key for key in different if key not in columns],
        labels={key: short(key, keys) for key in keys},
        names=short_names([trial.name for trial in ranked]),
    )


def _place(key: str) -> int:
    """Where a key's column is among others."""
    for place, start in enumerate(FIRST):
        if f"{key}.".startswith(f"{start}."):
            return place
    return len(FIRST)


def ranking_metric(trials: list[Trial]) -> str:
    """The metric that ranks these trials."""
    for metric in RANKED_BY:
        if any(math.isfinite(trial.score(metric)) for trial in trials):
            return metric
    return next(iter(RANKED_BY))


def swept(trials: list[Trial]) -> list[str]:
    """The keys of the trials' command lines whose values are not the same in all, in their order there."""
    return _varying(trials, lambda trial: trial.choices, setting)


def differing(trials: list[Trial]) -> list[str]:
    """The configuration keys whose values are not the same in all trials."""
    return _varying(trials, lambda trial: trial.config, lambda trial, key: trial.config.get(key))


def _varying(
    trials: list[Trial], keys_of: Callable[[Trial], Iterable[str]], value_of: Callable[[Trial, str], Any]
) -> list[str]:
    """The keys whose values are not the same in all trials that have a configuration."""
    readable = [trial for trial in trials if trial.config]
    keys: dict[str, None] = {}
    for trial in readable:
        keys |= dict.fromkeys(keys_of(trial))
    different = []
    for key in keys:
        values = {json.dumps(value_of(trial, key)) for trial in readable}
        if len(values) > 1 and not is_run_local(key):
            different.append(key)
    return different


def setting(trial: Trial, key: str) -> Any:
    """A trial's value of a key; of a group (`peft=lora`), and of what the configuration lacks, the command line's.

    A group that the command line doesn't have is what was chosen by default.
    """
    if key in trial.config:
        return trial.config[key]
    if key in trial.choices or "." in key:
        return trial.choices.get(key)
    return trial.groups.get(key)


def short_names(names: list[str]) -> dict[str, str]:
    """Names without the folders and values that all of them begin with."""
    start = 0
    if len(names) > 1:
        start = _shared_start(min(names), max(names))  # and so of all between these two
    return {name: name[start:] or name for name in names}


def _shared_start(first: str, last: str) -> int:
    """Characters of the folders and values that two names begin with, the sign behind them included."""
    shared = 0
    while shared < len(first) and first[shared] == last[shared]:
        shared += 1
    return max(first.rfind("/", 0, shared), first.rfind(",", 0, shared)) + 1


def format_value(value: object) -> str:
    """A number of a table: whole ones exactly, others with four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if 10_000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_setting(value: object) -> str:
    """A value of a configuration, as YAML would have it: `null`, `true`, 0.0001, text without quotes."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return format_value(value)
    return json.dumps(value, ensure_ascii=False)
