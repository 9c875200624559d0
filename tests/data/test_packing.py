"""Bins: everything once, nothing too long, nearly full, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.packing import one_per_sequence, pack


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 90), st.integers(0, 9))
def test_every_conversation_once_and_no_bin_too_full(lengths, capacity, seed):
    lengths = np.array(lengths)
    order, starts = pack(lengths, capacity, seed)
    assert sorted(order) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[order], starts[:-1])
    assert (sums <= capacity).all() and len(starts) - 1 == len(sums)
    # No two bins could be one: any two of them hold more than one bin does.
    assert len(sums) < 2 or np.sort(sums)[:2].sum() > capacity
    again = pack(lengths, capacity, seed)
    assert (again[0] == order).all() and (again[1] == starts).all()


def test_equals_the_plain_best_fit_decreasing():
    lengths = np.random.default_rng(0).integers(1, 400, 500)
    bins = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in bins if room >= length]
        if fitting:
            bins.remove(min(fitting))
            bins.append(min(fitting) - length)
        else:
            bins.append(1000 - length)
    _, starts = pack(lengths, 1000, 3)
    assert len(starts) - 1 == len(bins)


def test_the_seed_decides_who_comes_together():
    lengths = np.full(100, 10)
    assert (pack(lengths, 50, 1)[0] != pack(lengths, 50, 2)[0]).any()


def test_many_conversations_in_seconds_and_nearly_full():
    import time

    lengths = np.random.default_rng(1).integers(20, 600, 200_000)
    started = time.process_time()
    _, starts = pack(lengths, 4096, 0)
    assert time.process_time() - started < 10
    assert lengths.sum() / ((len(starts) - 1) * 4096) > 0.999


def test_alone():
    order, starts = one_per_sequence(3)
    assert order.tolist() == [0, 1, 2] and starts.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2])
def test_a_conversation_as_long_as_a_bin(count):
    _, starts = pack(np.full(count, 64), 64, 0)
    assert len(starts) - 1 == count
