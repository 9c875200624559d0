"""A mixture's frozen experts divided over two and four processes: one's output, and gradients as Megatron reduces them.

Beside data parallelism and tensor parallelism too, which divides the tokens.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from divided_mixture_worker import FAMILIES, LAYOUTS
from test_mixture_layer import CASES, adapt, adapters, gradients, inputs, our_layer, reference_block

HERE = Path(__file__).parent
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
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(HERE / "divided_mixture_worker.py"), str(folder)]
        processes = [subprocess.Popen([*command, str(rank), str(world)], env=env) for rank in range(world)]
        try:
            assert [process.wait(300) for process in processes] == [0] * world
        finally:
            for process in processes:
                process.kill()
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
