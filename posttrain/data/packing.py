"""Conversations into bins of one length."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: each conversation, longest first, into the fullest bin that still has room for it.

    The bins of each free length are kept in a list and the lengths that have any as bits of one integer, so that the
    fullest fitting bin is the lowest set bit above: O(n log n + n * capacity / 64).

    Args:
        lengths: int[n], tokens per conversation, each at least 1 and at most `capacity`.
        capacity: tokens per bin.
        seed: decides which of several equally long conversations come together; same seed, same bins.

    Returns:
        (order int64[n], starts int64[bins + 1]): bin b holds the conversations order[starts[b]:starts[b + 1]].
    """
    count = len(lengths)
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-lengths[order], kind="stable")]
    bin_of = np.empty(count, dtype=np.int64)
    free: list[list[int]] = [[] for _ in range(capacity + 1)]
    bits = 0
    bins = 0
    for at, length in enumerate(lengths[order].tolist()):
        fitting = bits >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = free[room].pop()
            if not free[room]:
                bits ^= 1 << room
        else:
            room, chosen = capacity, bins
            bins += 1
        bin_of[at] = chosen
        left = room - length
        if left:
            if not free[left]:
                bits |= 1 << left
            free[left].append(chosen)
    by_bin = np.argsort(bin_of, kind="stable")
    return order[by_bin], np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=bins))])


def alone(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins of one conversation each, in the same form as `pack`."""
    return np.arange(count), np.arange(count + 1)
