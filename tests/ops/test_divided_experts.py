"""Frozen experts of n processes, simulated one after another: the whole mixture's result and gradients."""

import mixture_reference as reference
import pytest
import torch
from mixture_reference import CHOSEN, EXPERTS, ROUTINGS, TOKENS, poisoned_memory, with_gradients

SIZES = [1, 2, 4, 8, 16]  # of 16 experts with 4 for a token: from 8 on a process has fewer than a token visits


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


def upstream():
    return torch.randn(TOKENS, reference.HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=ROUTINGS)
def exact(request):
    """(routing, what it is, by definition), in fp64."""
    probabilities, chosen = reference.choices(request.param)
    tensors, weights = reference.layer(torch.float64)
    results = with_gradients(
        lambda *inputs: reference.one_by_one(*inputs, weights, chosen), tensors, probabilities.double(), upstream()
    )
    return request.param, results


@pytest.mark.parametrize("count", SIZES)
def test_equal_to_experts_one_by_one(count, exact):
    from posttrain.ops.grouped_experts import ExpertWeights

    routing, right = exact
    k, _ = ROUTINGS[routing]
    probabilities, chosen = reference.choices(routing)
    tensors, weights = reference.layer(torch.float32)
    frozen = [ExpertWeights(matrix) for matrix in weights]
    with poisoned_memory():
        found = with_gradients(
            lambda *inputs: reference.of_processes(count, *inputs, frozen, chosen, k),
            tensors,
            probabilities,
            upstream(),
        )
    assert max(relative(one.double(), other) for one, other in zip(found, right, strict=True)) < 1e-5


@pytest.mark.parametrize("count", SIZES[1:])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_eight_bit_experts(routing, count):
    """Rows are quantised one by one, so n processes have one's numbers."""
    k, _ = ROUTINGS[routing]
    probabilities, chosen = reference.choices(routing)
    tensors, weights = reference.layer(torch.float32)
    frozen = [reference.in_eight_bits(matrix) for matrix in weights]
    results = []
    with poisoned_memory():
        for processes in (count, 1):
            results.append(
                with_gradients(
                    lambda *inputs, processes=processes: reference.of_processes(processes, *inputs, frozen, chosen, k),
                    tensors,
                    probabilities,
                    upstream(),
                )
            )
    assert max(relative(one, other) for one, other in zip(*results, strict=True)) < 1e-5


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_with_absent_rows(routing):
    from posttrain.ops.grouped_experts import Routing

    k, _ = ROUTINGS[routing]
    _, chosen = reference.choices(routing)
    for first in range(0, EXPERTS, 4):
        here = chosen[:, first : first + 4]
        found = Routing.from_map(here, k, partial=True)
        expert, token = here.t().nonzero().t()
        count = len(token)
        assert torch.equal(found.token[:count], token) and torch.equal(found.expert[:count], expert)
        assert (found.token[count:] == -1).all() and len(found.token) == TOKENS * k
        assert torch.equal(found.ends.long(), here.sum(0).cumsum(0))
        visits = (found.rows >= 0).sum(1)
        assert torch.equal(visits, here.sum(1))
        rows = found.rows[found.rows >= 0]
        assert torch.equal(token[rows], torch.arange(TOKENS).repeat_interleave(visits))
        assert len(rows.unique()) == count


def test_routings_are_what_they_are_called():
    of_four = {}
    for routing in ROUTINGS:
        _, chosen = reference.choices(routing)
        of_four[routing] = chosen.view(TOKENS, 4, 4).sum((0, 2)).tolist()
    assert of_four["a process without a row"][1] == 0
    assert of_four["all to one process"] == [0, 0, TOKENS * CHOSEN, 0]
    assert of_four["all to one expert"] == [0, TOKENS, 0, 0]
    assert 0 < of_four["uneven"][3] < of_four["uneven"][0]
