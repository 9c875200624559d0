"""Which conversations are trained on and which are held out, and the statistics of both."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data.dataset import Bins
from posttrain.data.store import Store


def joined(parts: Sequence[tuple[Store, dict[str, Any]]]) -> tuple[Store, dict[str, Any]]:
    """Several stores as one, and the sum of their counts."""
    if len(parts) == 1:
        return parts[0]
    counts: dict[str, Any] = {"rows": 0, "read": 0, "kept": 0, "truncated": 0, "dropped": Counter(), "examples": {}}
    for _, part in parts:
        for name in ("rows", "read", "kept", "truncated"):
            counts[name] += part[name]
        counts["dropped"].update(part["dropped"])
        counts["examples"] = {**part["examples"], **counts["examples"]}
    counts["dropped"] = dict(counts["dropped"])
    return Store([path for store, _ in parts for path in store.paths]), counts


def hold_out(digests: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split by what is said, so that duplicates come to the same side.

    Args:
        digests: int64[n].
        fraction: of the distinct conversations, for the second side; 0: none.
        seed: which of them.

    Returns:
        Indices of the first and of the second side, ascending. With a fraction and two distinct conversations neither
        side is empty.
    """
    distinct = np.unique(digests)
    count = round(fraction * len(distinct))
    if fraction:
        count = max(min(max(count, 1), len(distinct) - 1), 0)
    chosen = np.random.default_rng(seed).permutation(len(distinct))[:count]
    held_out = np.isin(digests, distinct[chosen])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def weighted(rows: np.ndarray, sources: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Rows of each source `weight` times per epoch: whole passes over all, the rest as a random part.

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
        chosen = np.random.default_rng([seed, source]).permutation(len(own))[: round(part * len(own))]
        taken += [own] * int(passes) + [own[np.sort(chosen)]]
    return np.concatenate(taken)


def statistics(bins: Bins, seq_length: int) -> dict[str, Any]:
    """What a split holds: conversations, tokens, trained share, length percentiles, how full the bins are."""
    lengths = bins.store.lengths[bins.order]
    tokens, trained = int(lengths.sum()), int(bins.store.trained[bins.order].sum())
    points = np.percentile(lengths, (0, 25, 50, 75, 95, 100), method="nearest").tolist()
    return {
        "conversations": len(lengths),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": trained / tokens,
        "length_percentiles": dict(zip(("0", "25", "50", "75", "95", "100"), map(int, points), strict=True)),
        "bins": len(bins),
        "packing_efficiency": tokens / (len(bins) * seq_length),
    }
