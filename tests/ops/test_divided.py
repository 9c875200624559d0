"""A layer with its LoRA, and the output layer's loss, divided over two processes: values and gradients of the whole."""

import inspect
from pathlib import Path

import divided_worker as worker
import pytest
import torch
from divided_worker import CASES, DIVIDED, HEADS, OUTPUTS, SCALE, SIZE, operation, output_layer, whole_layer, whole_mlp
from ranks import run_ranks

from posttrain.utils.gpus import visible_gpus

WORKER = Path(__file__).with_name("divided_worker.py")
TWO_GPUS = pytest.mark.skipif(visible_gpus() < SIZE, reason="needs two GPUs")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])
CLOSE = {"cpu": {}, "cuda": {"rtol": 1e-3, "atol": 1e-3}}  # fp64, fp32


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes has."""
    folder = tmp_path_factory.mktemp("divided")
    return lambda kind: run(kind, folder)


def run(kind, folder):
    """Each of two processes' results; they run once."""
    files = [folder / f"{rank}-{kind}.pt" for rank in range(SIZE)]
    if not files[0].exists():
        run_ranks(WORKER, [[str(rank), str(folder), kind] for rank in range(SIZE)], folder)
    return [torch.load(file) for file in files]


@pytest.fixture(scope="module")
def megatron():
    """Made importable here."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))


def alone(before):
    """[output, gradients of x, a, b] on one process, of a loss that weighs all outputs differently."""
    from posttrain.ops.fused_lora import FrozenLinearWithLoRA

    (x, weight, a, b), gamma = whole_layer(before)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    y = FrozenLinearWithLoRA.apply(x, weight, None, a, b, SCALE, operation(before, gamma))
    worker.loss(y, torch.arange(y.numel()).view_as(y)).backward()
    return [y.detach(), x.grad, a.grad, b.grad]


def joined(parts, dim, gated=False):
    """The whole of what processes have parts of; dim None: each has the whole."""
    if dim is None:
        assert torch.equal(*parts)
        return parts[0]
    if not gated:
        return torch.cat(parts, dim)
    pairs = [part.chunk(2, dim) for part in parts]
    return torch.cat([*(gate for gate, _ in pairs), *(up for _, up in pairs)], dim)


def assert_same(found, right, kind):
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE[kind])


def test_functions_of_torch_that_have_no_public_name():
    """Those of its symmetric memory take what posttrain.ops.division gives them."""
    from torch.distributed import _symmetric_memory as symmetric

    gather = ["shard", "shard_consumer", "ag_out", "group_name", "ag_out_needed"]
    assert list(inspect.signature(symmetric._pipelined_all_gather_and_consume).parameters) == gather
    exchange = ["chunk_producer", "output", "group_name"]
    assert list(inspect.signature(symmetric._pipelined_produce_and_all2all).parameters)[:3] == exchange
    assert list(inspect.signature(symmetric.get_symm_mem_workspace).parameters) == ["group_name", "min_size"]


def skip_gloo(kind, divided):
    if kind == "cpu" and divided == DIVIDED[2]:
        pytest.skip("of GPUs")


@pytest.mark.parametrize("kind", ["cpu", GPU])
@pytest.mark.parametrize("case", CASES)
def test_layer(case, kind, found, megatron):
    before, inputs_divided, divided = case
    skip_gloo(kind, divided)
    y, x, a, b = zip(*(process["layers"][case] for process in found(kind)), strict=True)
    tokens = None if divided == "outputs" else 0
    if inputs_divided:
        whole = [joined(y, tokens), joined(x, -1, before == "silu"), joined(a, 1), joined(b, 0)]
    else:
        whole = [joined(y, -1), joined(x, tokens), joined(a, 0), joined(b, 0)]
    assert whole[0].size(-1) == OUTPUTS
    assert_same(whole, alone(before), kind)


def plain_mlp():
    """[output, gradients of x and the adapters] of an MLP as it is defined, by autograd."""
    (x, weight, second, a, b, second_a, second_b), gamma = whole_mlp()
    trained = [x, a, b, second_a, second_b]
    for tensor in trained:
        tensor.requires_grad_()
    normed = torch.nn.functional.rms_norm(x, (x.size(-1),), gamma, 1e-5)
    gate, up = (normed @ weight.t() + SCALE * normed @ a.t() @ b.t()).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    y = inner @ second.t() + SCALE / 2 * inner @ second_a.t() @ second_b.t()
    worker.loss(y, torch.arange(y.numel()).view_as(y)).backward()
    return [y.detach(), *(tensor.grad for tensor in trained)]


@pytest.mark.parametrize("kind", ["cpu", GPU])
@pytest.mark.parametrize("divided", DIVIDED)
def test_mlp(divided, kind, found):
    skip_gloo(kind, divided)
    parts = list(zip(*(process["mlps"][divided] for process in found(kind)), strict=True))
    tokens = None if divided == "outputs" else 0
    dims = [tokens, tokens, 0, 0, 1, 0]
    whole = [joined(part, dim, gated=number == 3) for number, (part, dim) in enumerate(zip(parts, dims, strict=True))]
    assert_same(whole, plain_mlp(), kind)


@pytest.mark.parametrize(("biased", "softcap", "holders"), HEADS)
def test_losses(biased, softcap, holders, found):
    hidden, weight, bias, labels, upstream = output_layer()
    logits = hidden @ weight.t()
    if biased:
        logits = logits + bias
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (losses * upstream).sum().backward()
    parts = [process["losses"][biased, softcap, holders] for process in found("cpu")]
    for own, _ in parts:
        torch.testing.assert_close(own, losses.detach())
    torch.testing.assert_close(sum(gradient for _, gradient in parts), hidden.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [37, 5000, 40000])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_kernels_of_the_loss(width, softcap):
    """Those of a GPU against what they stand for."""
    if not torch.cuda.is_available() or str(torch.cuda.current_device()) == "cpu":
        pytest.skip("no GPU")
    from posttrain.ops.linear_cross_entropy import log_sum_gradient_, log_sum_parts

    torch.manual_seed(0)
    logits = 5 * torch.randn(300, width).to(torch.bfloat16)
    labels = torch.randint(-width, 2 * width, (300,))
    right = log_sum_parts(logits, labels, softcap)
    found = log_sum_parts(logits.cuda(), labels.cuda(), softcap)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    log_sums = right[0] + right[1].log() + 0.5
    on_gpu = logits.cuda()
    log_sum_gradient_(on_gpu, labels.cuda(), log_sums.cuda(), softcap)
    log_sum_gradient_(logits, labels, log_sums, softcap)
    torch.testing.assert_close(on_gpu.cpu().float(), logits.float(), rtol=1e-2, atol=1e-4)
