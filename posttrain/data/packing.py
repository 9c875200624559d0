"""Pack conversations into sequences of one length, as bins are packed."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack by best-fit decreasing: each conversation, longest first, into the fullest sequence that it fits.

    The sequences of each free length are kept in a list, and the lengths that have any as bits of one integer, so that
    the fullest that fits is the lowest set bit above: O(n log n + n * capacity / 64).

    Args:
        lengths: int[n], tokens per conversation, each at least 1 and at most `capacity`.
        capacity: tokens per packed sequence.
        seed: decides which of several equally long conversations come together.

    Returns:
        (order int64[n], starts int64[sequences + 1]): sequence i holds the conversations
        order[starts[i]:starts[i + 1]].
    """
    count = len(lengths)
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-lengths[order], kind="stable")]
    sequence_of = np.empty(count, dtype=np.int64)
    free: list[list[int]] = [[] for _ in range(capacity + 1)]
    bits = 0
    sequences = 0
    for position, length in enumerate(lengths[order].tolist()):
        fitting = bits >> length
        if fitting:
            free_before = length + (fitting & -fitting).bit_length() - 1
            chosen = free[free_before].pop()
            if not free[free_before]:
                bits ^= 1 << free_before
        else:
            free_before = capacity
            chosen = sequences
            sequences += 1
        sequence_of[position] = chosen
        free_after = free_before - length
        if free_after:
            if not free[free_after]:
                bits |= 1 << free_after
            free[free_after].append(chosen)
    by_sequence = np.argsort(sequence_of, kind="stable")
    sizes = np.bincount(sequence_of, minlength=sequences)
    return order[by_sequence], np.concatenate([[0], np.cumsum(sizes)])


def fits(order: np.ndarray, starts: np.ndarray, count: int) -> bool:
    """Whether `order` and `starts` are packed sequences of `count` conversations, in the form of `pack`."""
    if not len(starts) or starts[0] != 0 or starts[-1] != len(order) or np.any(np.diff(starts) < 1):
        return False
    return not len(order) or (order.min() >= 0 and order.max() < count)


def one_per_sequence(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences of one conversation each, in the same form as `pack`."""
    return np.arange(count), np.arange(count + 1)
