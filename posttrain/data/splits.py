"""Split conversations into those trained on and those held out, and describe both."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data.dataset import PackedDataset
from posttrain.data.store import Store

SUMMED = ("rows", "read", "kept", "truncated", "split", "turns")  # counts that are one number
PERCENTILES = (0, 25, 50, 75, 95, 100)


def join_stores(
    parts: Sequence[tuple[Store, dict[str, Any]]],
) -> tuple[Store, dict[str, Any]]:
    """Return several stores as one, and the sum of their counts."""
    if len(parts) == 1:
        return parts[0]
    counts: dict[str, Any] = dict.fromkeys(SUMMED, 0)
    counts |= {"dropped": Counter(), "unread": Counter(), "examples": {}}
    paths = []
    for store, part in parts:
        for name in SUMMED:
            counts[name] += part[name]
        counts["dropped"].update(part["dropped"])
        counts["unread"].update(part["unread"])
        counts["examples"] = {**part["examples"], **counts["examples"]}
        paths += store.paths
    counts["dropped"] = dict(counts["dropped"])
    counts["unread"] = dict(counts["unread"])
    return Store(paths), counts


def hold_out(
    digests: np.ndarray, fraction: float, seed: int, trees: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split by content, so that duplicates are on the same side, and so are the conversations of a tree.

    Args:
        digests: int64[n].
        fraction: of the distinct conversations or trees, for the second side; 0: none.
        seed: which of them.
        trees: int64[n], equal for the conversations of a tree, 0 for one by itself; None: there are no trees.

    Returns:
        Indices of the first and of the second side, ascending. With a fraction and two distinct
        conversations or trees neither side is empty.
    """
    if trees is not None and trees.any():
        digests = _joined(digests, trees)
    distinct = np.unique(digests)
    count = round(fraction * len(distinct))
    if fraction:
        count = max(min(max(count, 1), len(distinct) - 1), 0)
    chosen = np.random.default_rng(seed).permutation(len(distinct))[:count]
    held_out = np.isin(digests, distinct[chosen])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _joined(digests: np.ndarray, trees: np.ndarray) -> np.ndarray:
    """One number, the least digest, for all that duplicates and trees join: int64[n]."""
    joined = digests
    within = trees != 0
    while True:
        least = _least(joined, digests)
        least[within] = _least(least[within], trees[within])
        if (least == joined).all():
            return joined
        joined = least


def _least(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each value the least of its group: int64[n]."""
    names, group = np.unique(groups, return_inverse=True)
    least = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(least, group, values)
    return least[group]


def repeat_by_weight(rows: np.ndarray, sources: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Repeat each source's rows `weight` times: whole passes, and a random part for the fraction.

    Args:
        rows: int64[m], indices of the rows to take from.
        sources: int64[n], the source of every row.
        weights: float[sources].
        seed: which rows a part has.
    """
    if (weights == 1).all():
        return rows
    taken = []
    for source, weight in enumerate(weights.tolist()):
        own = rows[sources[rows] == source]
        passes, part = divmod(weight, 1)
        shuffled = np.random.default_rng([seed, source]).permutation(len(own))
        chosen = np.sort(shuffled[: round(part * len(own))])
        taken += [own] * int(passes)
        taken.append(own[chosen])
    return np.concatenate(taken)


def describe(dataset: PackedDataset, seq_length: int) -> dict[str, Any]:
    """Return what a split holds, and how full its packed sequences are."""
    lengths = dataset.store.lengths[dataset.order]
    tokens = int(lengths.sum())
    supervised = int(dataset.store.supervised[dataset.order].sum())
    percentiles = {}
    for point, length in zip(PERCENTILES, np.percentile(lengths, PERCENTILES, method="nearest"), strict=True):
        percentiles[str(point)] = int(length)
    return {
        "conversations": len(lengths),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / tokens,
        "length_percentiles": percentiles,
        "packed_sequences": len(dataset),
        "packing_efficiency": tokens / (len(dataset) * seq_length),
    }
