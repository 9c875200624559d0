"""A mixture's frozen experts divided over two and four processes: one's output, and gradients as Megatron reduces them.

Beside data parallelism and tensor parallelism too, which divides the tokens.
"""

from pathlib import Path

import pytest
import torch
from divided_mixture_worker import FAMILIES, LAYOUTS
from ranks import run_ranks
from test_mixture_layer import CASES, adapt, adapters, gradients, inputs, our_layer, reference_block

WORKER = Path(__file__).with_name("divided_mixture_worker.py")
PARAMS = [(2, layout) for layout in LAYOUTS[2]]
PARAMS += [pytest.param(4, layout, marks=pytest.mark.nightly) for layout in LAYOUTS[4]]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of a number of processes has."""
    folder = tmp_path_factory.mktemp("divided")
    return lambda world: run(world, folder)


def run(world, folder):
    """Each process's results; they run once."""
    files = [folder / f"{rank}-{world}.pt" for rank in range(world)]
    if not files[0].exists():
        run_ranks(WORKER, [[str(folder), str(rank), str(world)] for rank in range(world)], folder)
    return [torch.load(file) for file in files]


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, megatron):
    """(family, output and gradients of one process)."""
    case = CASES[request.param]
    layer = our_layer(torch, reference_block(torch, *case), *case[1:])
    ours = adapt(torch, layer, [pair.detach().clone() for pair in adapters(torch)])
    x = inputs(torch).requires_grad_()
    y, _ = layer(x)
    return request.param, [y.detach(), *gradients(torch, y, x, *ours)]


def close(one, other):
    """Within 1e-5 of the norm."""
    return ((one - other).norm() / other.norm()).item() < 1e-5


@pytest.mark.parametrize(("world", "layout"), PARAMS)
def test_equal_to_one_process(world, layout, whole, found):
    family, (y, grad_x, *grads) = whole
    processes = [process[layout, family] for process in found(world)]
    assert close(torch.cat([process["y"] for process in processes]), y)
    assert close(torch.cat([process["x"] for process in processes]), grad_x)
    for process in processes:
        for reduced, gradient in zip(process["adapters"], grads, strict=True):
            assert close(reduced, gradient)
        assert process["norm"] == pytest.approx(torch.stack([g.norm() for g in grads]).norm().item(), rel=1e-5)
