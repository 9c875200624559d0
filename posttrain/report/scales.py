"""Where the values of a key lie on an axis, and in which bin of a heat map."""

import math
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, TypeGuard

from posttrain.report.comparison import Comparison, format_setting, format_value, setting
from posttrain.report.trials import Trial, is_number

LOG_RATIO = 8  # a key whose largest value is so many times its smallest gets a logarithmic axis
MOST_VALUES = 12  # that have a tick and a bin of their own; more numbers are put into BINS
BINS = 8


@dataclass(frozen=True)
class Axis:
    """One key, or one result, of all trials.

    Attributes:
        key: its name.
        label: the same in short.
        ticks: (position, text), from 0 at one end to 1 at the other.
        positions: of each trial; None: it has no value.
        bins: the texts of a heat map's rows or columns; none for a result.
        places: each trial's index in `bins`.
    """

    key: str
    label: str
    ticks: list[tuple[float, str]]
    positions: list[float | None]
    bins: list[str]
    places: list[int]


def key_axes(comparison: Comparison, trials: list[Trial]) -> list[Axis]:
    """The axes of the swept keys."""
    axes = []
    for key in comparison.keys:
        axes.append(key_axis(key, comparison.labels[key], [setting(trial, key) for trial in trials]))
    return axes


def key_axis(key: str, label: str, values: list[Any]) -> Axis:
    """The axis of a key; values that are not numbers are spaced evenly, by name behind the numbers."""
    distinct = sort_distinct(values)
    texts = list(distinct)
    numeric = all(map(is_quantity, distinct.values()))
    if numeric and len(distinct) > MOST_VALUES:
        return _binned(key, label, list(map(float, values)))
    if numeric:
        spots = place(list(map(float, distinct.values())))
    else:
        spots = place(list(map(float, range(len(texts)))), even=True)
    places = list(map(texts.index, map(format_setting, values)))
    return Axis(
        key=key,
        label=label,
        ticks=list(zip(spots, texts, strict=True)),
        positions=[spots[index] for index in places],
        bins=texts,
        places=places,
    )


def result_axis(key: str, label: str, values: list[Any]) -> Axis | None:
    """The axis of a number of the summary, None where no trial has it."""
    known: dict[int, float] = {}  # trial -> value
    for index, value in enumerate(values):
        if is_number(value):
            known[index] = float(value)
    if not known:
        return None
    numbers = list(known.values())
    positions: list[float | None] = [None] * len(values)
    for index, position in zip(known, place(numbers), strict=True):
        positions[index] = position
    ends = sorted({min(numbers), max(numbers)})
    return Axis(
        key=key,
        label=label,
        ticks=list(zip(place(ends), map(format_value, ends), strict=True)),
        positions=positions,
        bins=[],
        places=[],
    )


def is_logarithmic(values: list[float]) -> bool:
    """Whether values span so much that their logarithms are drawn."""
    return min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def is_quantity(value: object) -> TypeGuard[float]:
    """Whether a value has a size: a number, and neither true nor false."""
    return is_number(value) and not isinstance(value, bool)


def place(values: list[float], even: bool = False) -> list[float]:
    """Positions from 0 for the smallest to 1 for the largest, 0.5 where all are the same."""
    if not even and is_logarithmic(values):
        values = list(map(math.log, values))
    low, span = min(values), max(values) - min(values)
    if span == 0:
        return [0.5] * len(values)
    return [round((value - low) / span, 4) for value in values]


def sort_distinct(values: list[Any]) -> dict[str, Any]:
    """Text -> value of the distinct values: numbers by size, then the rest by name."""
    numbers: dict[str, float] = {}
    others: dict[str, Any] = {}
    for value in values:
        if is_quantity(value):
            numbers[format_setting(value)] = value
        else:
            others[format_setting(value)] = value
    by_size = sorted(numbers.items(), key=itemgetter(1))
    by_name = sorted(others.items(), key=itemgetter(0))
    return dict(by_size + by_name)


def _binned(key: str, label: str, values: list[float]) -> Axis:
    """The axis of many numbers: their positions as they are, their bins evenly wide."""
    positions = place(values)
    low, high = min(values), max(values)
    edges, texts = [], []
    for index in range(BINS + 1):
        edge = index / BINS
        edges.append(edge)
        value = low + edge * (high - low)
        if is_logarithmic(values):
            value = low * (high / low) ** edge
        texts.append(f"{value:.3g}")
    return Axis(
        key=key,
        label=label,
        ticks=list(zip(edges, texts, strict=True))[::2],
        positions=list(positions),
        bins=[f"{start} to {end}" for start, end in pairwise(texts)],
        places=[min(BINS - 1, int(position * BINS)) for position in positions],
    )
