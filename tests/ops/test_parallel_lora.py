"""A layer that tensor parallelism divides, with its LoRA, equals the whole one on one process: values and gradients."""

from functools import partial

import pytest
import torch
import torch.multiprocessing as mp

SIZE = 2
SCALE = 0.7
TOKENS, WIDTH, RANK = 6, 8, 4


@pytest.fixture(scope="module", autouse=True)
def megatron():
    """Made importable here; the processes are forks of this one."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    import posttrain.ops.fused_lora  # noqa: F401


def whole_layer(before):
    """(x, weight, a, b) of a layer and what it does first, from one seed."""
    torch.manual_seed(0)
    outputs = 12
    inputs = 2 * WIDTH if before == "swiglu" else WIDTH
    shapes = [(TOKENS, 1, inputs), (outputs, WIDTH), (RANK, WIDTH), (outputs, RANK)]
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes], torch.rand(WIDTH, dtype=torch.float64)


def operation(before, gamma):
    from posttrain.ops.recomputed_norms import Norm, SwiGLU

    return {"nothing": None, "rms": Norm(gamma, 1e-5), "swiglu": SwiGLU()}[before]


def alone(before):
    """Output and gradients (x, a, b) on one process, of a loss that weighs all outputs differently."""
    from posttrain.ops.fused_lora import FrozenLinearWithLoRA

    (x, weight, a, b), gamma = whole_layer(before)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    y = FrozenLinearWithLoRA.apply(x, weight, None, a, b, SCALE, operation(before, gamma))
    (y.sin() * torch.arange(y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, a.grad, b.grad]


def halves(tensor, dim, gated=False):
    """A tensor's parts; of gates and what they gate, those of both."""
    if not gated:
        return tensor.chunk(SIZE, dim)
    gates, ups = (half.chunk(SIZE, dim) for half in tensor.chunk(2, dim))
    return [torch.cat([gate, up], dim) for gate, up in zip(gates, ups, strict=True)]


def one_rank(rank, before, inputs_divided, sequence, store, out):
    """Write what this process has of the output and the gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    from posttrain.ops.fused_lora import FrozenLinearWithLoRA
    from posttrain.ops.parallel_lora import Division, RowParallelWithLoRA, WholeMatrices

    division = Division(torch.distributed.group.WORLD, sequence)
    (x, weight, a, b), gamma = whole_layer(before)
    gated = before == "swiglu"
    part = partial(halves, gated=gated)
    if inputs_divided:
        own_x = part(x, -1)[rank]
        own = [halves(weight, 1)[rank], halves(a, 1)[rank], halves(b, 0)[rank]]
    else:
        own_x = halves(x, 0)[rank] if sequence else x
        own = [halves(weight, 0)[rank], halves(a, 0)[rank], halves(b, 0)[rank]]
    x, weight, a, b = (tensor.clone().contiguous() for tensor in (own_x, *own))
    for tensor in (x, a, b):
        tensor.requires_grad_()
    first = operation(before, gamma)
    if inputs_divided:
        (whole,) = WholeMatrices.apply(division, b)
        y = RowParallelWithLoRA.apply(x, weight, None, a, whole, SCALE, first, division)
    else:
        (whole,) = WholeMatrices.apply(division, a)
        y = FrozenLinearWithLoRA.apply(x, weight, None, whole, b, SCALE, first, division)
    weights = torch.arange(TOKENS * 12).view(TOKENS, 1, 12)
    if not inputs_divided:
        weights = halves(weights, -1)[rank]
    elif sequence:
        weights = halves(weights, 0)[rank]
    (y.sin() * weights).sum().backward()
    torch.save([y.detach(), x.grad, a.grad, b.grad], out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


CASES = [(before, inputs, sequence)
         for before, inputs in (("nothing", False), ("rms", False), ("nothing", True), ("swiglu", True))
         for sequence in (False, True)]  # fmt: skip


@pytest.mark.parametrize(("before", "inputs_divided", "sequence"), CASES)
def test_two_processes(before, inputs_divided, sequence, tmp_path):
    context = mp.get_context("fork")
    processes = []
    for rank in range(SIZE):
        args = (rank, before, inputs_divided, sequence, tmp_path / "store", tmp_path)
        processes.append(context.Process(target=one_rank, args=args))
        processes[-1].start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    y, x, a, b = zip(*parts, strict=True)
    gated = before == "swiglu"
    right = alone(before)
    found_y = y[0]
    if not inputs_divided:
        found_y = torch.cat(y, -1)
    elif sequence:
        found_y = torch.cat(y, 0)
    found_x = torch.cat(x, 0)
    if inputs_divided:
        found_x = torch.cat(x, -1)
        if gated:
            pairs = [part.chunk(2, -1) for part in x]
            found_x = torch.cat([gate for gate, _ in pairs] + [up for _, up in pairs], -1)
    elif not sequence:
        found_x = x[0]
    found = [found_y, found_x, torch.cat(a, 1 if inputs_divided else 0), torch.cat(b, 0)]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
