"""One process of two that divide a layer, or the output layer, by tensor parallelism.

`divided_worker.py RANK FOLDER [cuda]` writes FOLDER/RANK.pt: for each case of a layer and of an MLP its output and
gradients here, and for the output layer losses and the gradient of its input.
"""

import itertools
import sys
from pathlib import Path

import torch

SIZE = 2
SCALE = 0.7
TOKENS, WIDTH, RANK, OUTPUTS = 6, 8, 4, 12
VOCABULARY = 21  # the second part has a row less
LAYERS = (("nothing", False), ("rms", False), ("nothing", True), ("silu", True))
# A bias, a soft cap, and how many of the processes have tokens, not only rows that fill up.
HEADS = ((False, None, 2), (True, None, 2), (True, 1.5, 2), (True, 1.5, 1))
DIVIDED = ("outputs", "tokens", "tokens, beside products")
CASES = [(*layer, divided) for layer, divided in itertools.product(LAYERS, DIVIDED)]
INNER = 10  # of the MLP, between its layers


def division_of(divided):
    """What the words of DIVIDED stand for."""
    from posttrain.ops.division import Division

    return Division(torch.distributed.group.WORLD, divided != "outputs", divided == "tokens, beside products")


def whole_layer(before):
    """([x, weight, a, b], gamma) of a layer, from one seed."""
    torch.manual_seed(0)
    inputs = 2 * WIDTH if before == "silu" else WIDTH
    shapes = [(TOKENS, 1, inputs), (OUTPUTS, WIDTH), (RANK, WIDTH), (OUTPUTS, RANK)]
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes], torch.rand(WIDTH, dtype=torch.float64)


def operation(before, gamma):
    """What is done to the layer's input first."""
    from posttrain.ops.recomputed_norms import Activation, Norm

    return {"nothing": None, "rms": Norm(gamma, 1e-5), "silu": Activation("silu")}[before]


def output_layer():
    """(hidden, weight, bias, labels, upstream gradient) of an output layer."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    return hidden.requires_grad_(), weight, bias, torch.randint(0, VOCABULARY, (TOKENS,)), torch.rand(TOKENS)


def parts(tensor, dim, gated=False):
    """A tensor's parts; of gates and what they gate, those of both."""
    if not gated:
        return tensor.chunk(SIZE, dim)
    gates, ups = (half.chunk(SIZE, dim) for half in tensor.chunk(2, dim))
    return [torch.cat([gate, up], dim) for gate, up in zip(gates, ups, strict=True)]


def whole_mlp():
    """([x, weights of both layers, a, b, a of the second, b of the second], gamma) from one seed."""
    torch.manual_seed(1)
    shapes = [(TOKENS, 1, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)]
    shapes += [(RANK, WIDTH), (2 * INNER, RANK), (RANK, INNER), (WIDTH, RANK)]
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes], torch.rand(WIDTH, dtype=torch.float64)


def loss(y, weights):
    """Of an output, which weighs all of it differently."""
    return (y.sin() * weights.to(y)).sum()


def frozen_mlp(weight, second, gamma, division):
    """What is not trained of it."""
    from posttrain.ops.fp8_linear import Weight
    from posttrain.ops.fused_mlp import FrozenMLP
    from posttrain.ops.recomputed_norms import Activation, Norm

    norm = Norm(gamma, 1e-5)
    return FrozenMLP(Weight(weight), Weight(second), SCALE, SCALE / 2, Activation("silu"), norm, division)


def mlp(rank, divided, device):
    """[output, gradients of x and the adapters] of this process."""
    from posttrain.ops.fused_mlp import MLPWithLoRA
    from posttrain.ops.parallel_lora import WholeMatrices

    division = division_of(divided)
    (x, weight, second, a, b, second_a, second_b), gamma = whole_mlp()
    weights = torch.arange(TOKENS * WIDTH).view(TOKENS, 1, WIDTH)
    own = [[x] * SIZE, parts(weight, 0, gated=True), parts(second, 1)]
    own += [parts(a, 0), parts(b, 0, gated=True), parts(second_a, 1), parts(second_b, 0)]
    if division.sequence:
        own[0] = parts(x, 0)
        weights = parts(weights, 0)[rank]
    x, weight, second, a, b, second_a, second_b = (tensor[rank].to(**device).contiguous() for tensor in own)
    trained = [x, a, b, second_a, second_b]
    for tensor in trained:
        tensor.requires_grad_()
    whole_a, whole_b = WholeMatrices.apply(division.group, division.sequence, a, second_b)
    frozen = frozen_mlp(weight, second, gamma.to(**device), division)
    y = MLPWithLoRA.apply(x, frozen, whole_a, b, second_a, whole_b)
    loss(y, weights).backward()
    return [tensor.cpu() for tensor in (y.detach(), *(tensor.grad for tensor in trained))]


def layer(rank, before, inputs_divided, divided, device):
    """[output, gradients of x, a, b] of this process."""
    from posttrain.ops.fused_lora import FrozenLinearWithLoRA
    from posttrain.ops.parallel_lora import RowParallelWithLoRA, WholeMatrices

    division = division_of(divided)
    (x, weight, a, b), gamma = whole_layer(before)
    weights = torch.arange(TOKENS * OUTPUTS).view(TOKENS, 1, OUTPUTS)
    if inputs_divided:
        own = [parts(x, -1, before == "silu"), parts(weight, 1), parts(a, 1), parts(b, 0)]
        weights = parts(weights, 0)[rank] if division.sequence else weights
    else:
        own = [parts(x, 0) if division.sequence else [x] * SIZE, parts(weight, 0), parts(a, 0), parts(b, 0)]
        weights = parts(weights, -1)[rank]
    x, weight, a, b = (tensor[rank].to(**device).clone().contiguous() for tensor in own)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    first = operation(before, gamma.to(**device))
    if inputs_divided:
        (whole,) = WholeMatrices.apply(division.group, division.sequence, b)
        y = RowParallelWithLoRA.apply(x, weight, None, a, whole, SCALE, first, division)
    else:
        (whole,) = WholeMatrices.apply(division.group, division.sequence, a)
        y = FrozenLinearWithLoRA.apply(x, weight, None, whole, b, SCALE, first, division)
    loss(y, weights).backward()
    return [tensor.cpu() for tensor in (y.detach(), x.grad, a.grad, b.grad)]


def filled_up(rows):
    """Rows, and three more that are no tokens'."""
    return torch.cat([rows, rows.new_full((3, *rows.shape[1:]), 3.0)])


def losses(rank):
    """[losses, gradient of the input] of this process for each of HEADS."""
    from posttrain.ops import linear_cross_entropy

    linear_cross_entropy.LOGIT_ROWS = 4  # several chunks, the last not full
    group = torch.distributed.group.WORLD
    results = {}
    for biased, softcap, holders in HEADS:
        rows = -(-VOCABULARY // holders)
        own = slice(rank * rows, (rank + 1) * rows)
        hidden, weight, bias, labels, upstream = output_layer()
        bias = filled_up(bias[own]) if biased else None
        tokens = len(weight[own])
        operation = linear_cross_entropy.DividedLinearCrossEntropy
        found = operation.apply(hidden, filled_up(weight[own]), bias, labels - rank * rows, group, softcap, tokens)
        (found * upstream).sum().backward()
        results[biased, softcap, holders] = [found.detach(), hidden.grad]
    return results


def main():
    """Compute everything."""
    rank, folder, kind = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    from posttrain import patches

    patches.apply(patches.Platform(kind, kind == "cuda"))
    store = f"file://{folder}/store-{kind}"
    found = {}
    if kind == "cuda":
        device = {"device": torch.device("cuda", rank), "dtype": torch.float32}
        torch.cuda.set_device(rank)
        torch.distributed.init_process_group("nccl", init_method=store, rank=rank, world_size=SIZE)
        how = DIVIDED
    else:
        device = {"device": torch.device("cpu"), "dtype": torch.float64}
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE)
        how = DIVIDED[:2]
        found["losses"] = losses(rank)
    found["layers"] = {case: layer(rank, *case, device) for case in CASES if case[-1] in how}
    found["mlps"] = {divided: mlp(rank, divided, device) for divided in how}
    torch.save(found, folder / f"{rank}-{kind}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
