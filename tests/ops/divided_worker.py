"""One process of two that divide a layer, or the output layer, by tensor parallelism: `divided_worker.py RANK FOLDER`.

Writes FOLDER/RANK.pt: for each case of a layer its output and gradients here, and for the output layer losses and the
gradient of its input.
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
HEADS = ((False, None), (True, None), (True, 1.5))  # a bias, a soft cap
CASES = [(*layer, sequence) for layer, sequence in itertools.product(LAYERS, (False, True))]


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


def layer(rank, before, inputs_divided, sequence):
    """[output, gradients of x, a, b] of this process."""
    from posttrain.ops.fused_lora import FrozenLinearWithLoRA
    from posttrain.ops.parallel_lora import Division, RowParallelWithLoRA, WholeMatrices

    division = Division(torch.distributed.group.WORLD, sequence)
    (x, weight, a, b), gamma = whole_layer(before)
    weights = torch.arange(TOKENS * OUTPUTS).view(TOKENS, 1, OUTPUTS)
    if inputs_divided:
        own = [parts(x, -1, before == "silu"), parts(weight, 1), parts(a, 1), parts(b, 0)]
        weights = parts(weights, 0)[rank] if sequence else weights
    else:
        own = [parts(x, 0) if sequence else [x] * SIZE, parts(weight, 0), parts(a, 0), parts(b, 0)]
        weights = parts(weights, -1)[rank]
    x, weight, a, b = (divided[rank].clone().contiguous() for divided in own)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    first = operation(before, gamma)
    if inputs_divided:
        (whole,) = WholeMatrices.apply(division, b)
        y = RowParallelWithLoRA.apply(x, weight, None, a, whole, SCALE, first, division)
    else:
        (whole,) = WholeMatrices.apply(division, a)
        y = FrozenLinearWithLoRA.apply(x, weight, None, whole, b, SCALE, first, division)
    (y.sin() * weights).sum().backward()
    return [y.detach(), x.grad, a.grad, b.grad]


def losses(rank):
    """[losses, gradient of the input] of this process for each of HEADS."""
    from posttrain.ops import linear_cross_entropy

    linear_cross_entropy.LOGIT_ROWS = 4  # several chunks, the last not full
    group = torch.distributed.group.WORLD
    rows = -(-VOCABULARY // SIZE)
    own = slice(rank * rows, (rank + 1) * rows)
    results = {}
    for biased, softcap in HEADS:
        hidden, weight, bias, labels, upstream = output_layer()
        bias = bias[own] if biased else None
        operation = linear_cross_entropy.DividedLinearCrossEntropy
        found = operation.apply(hidden, weight[own], bias, labels - rank * rows, group, softcap)
        (found * upstream).sum().backward()
        results[biased, softcap] = [found.detach(), hidden.grad]
    return results


def main():
    """Compute everything."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    found = {case: layer(rank, *case) for case in CASES}
    torch.save({"layers": found, "losses": losses(rank)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
