"""LoRA of layers that tensor parallelism divides, in the operations of the layers themselves.

Megatron-Bridge computes the adapter beside the layer: each gathers the same input, and the adapter sums and gathers its
own output. Since both are linear, the adapter can ride along instead. A layer with divided outputs gathers its input
once; in the backward pass the input's gradient of both is one partial sum. A layer with divided inputs adds its part of
the adapter's product to its own before the sum over processes. That requires the rank-r matrix that the adapter divides
on the undivided side whole on each process; `WholeMatrices` gathers those of a model at once, and sums their gradients
at once.
"""

from typing import Any

import torch
import torch.distributed as dist

from posttrain.ops.division import Division, gather, reduce_scatter
from posttrain.ops.fp8_linear import Product, Weight
from posttrain.ops.low_rank import LowRank, scaled_product, weight_gradient
from posttrain.ops.recomputed_norms import Activation, Norm, backward_through

type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given


class WholeMatrices(torch.autograd.Function):
    """Matrices divided along their first dimension -> whole ones.

    With sequence parallelism each process's gradient of a whole one is of its own tokens; without, of all.
    """

    @staticmethod
    def forward(ctx: Context, group: dist.ProcessGroup, sequence: bool, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each [k, m] -> [n k, m]."""
        ctx.group = group
        ctx.sequence = sequence
        return tuple(gather(list(own), group))

    @staticmethod
    def backward(ctx: Context, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each [n k, m] -> [k, m]."""
        group: dist.ProcessGroup = ctx.group
        if ctx.sequence:
            return (None, None, *reduce_scatter(list(upstream), group))
        size, rank = group.size(), group.rank()
        return (None, None, *(gradient.chunk(size)[rank] for gradient in upstream))


def gathered_product(
    division: Division,
    product: Product,
    own: torch.Tensor,
    features: int,
    scale: float,
    narrow: torch.Tensor,
    wide: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of all tokens with a frozen matrix and an adapter's narrow one.

    Args:
        division: of the layer.
        product: with the frozen matrix, k -> features.
        own: [t/n, k], this process's tokens.
        features: outputs of the frozen matrix.
        scale: of the adapter's product.
        narrow: [k, r].
        wide: [r, features]; the adapter's product with it is added to the frozen one. None: it is not.

    Returns:
        [t, features], and scale own narrow [t, r].
    """
    tokens = own.size(0) * division.parts
    low = own.new_empty(tokens, narrow.size(1))
    out = own.new_empty(tokens, features)

    def consume(part: torch.Tensor, rows: slice) -> None:
        scaled_product(scale, part, narrow, low[rows])
        product(part, out[rows])
        if wide is not None:
            out[rows].addmm_(low[rows], wide)

    division.each_part(own, consume)
    return out, low


def summed_product(
    division: Division, product: Product, x: torch.Tensor, features: int, added: LowRank
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over the processes of x's product with a frozen matrix, `added` included.

    Args:
        division: of the layer.
        product: with the frozen matrix, k -> features.
        x: [t, k], of which each process has a part of the features.
        features: outputs of the frozen matrix.
        added: to the product, of all tokens.

    Returns:
        Own tokens of the sum [t/n, features], and of the sum of `added.left` [t/n, r].
    """

    def produce(rows: slice, out: torch.Tensor) -> None:
        product(x[rows], out)
        out.addmm_(added.left[rows], added.right)

    return division.sums(produce, features, added.left)


class RowParallelWithLoRA(torch.autograd.Function):
    """y = f(x) W^T + scale (f(x) A^T) B^T, inputs divided; W and f frozen, f computed again in the backward pass.

    For divided outputs see posttrain.ops.fused_lora.FrozenLinearWithLoRA.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        before: Norm | Activation | None,
        division: Division,
    ) -> torch.Tensor:
        """x [t, ..., in'], weight [out, in/n], a [rank, in/n], b [out, rank], f: in' -> in/n; gives [t/n, ..., out]."""
        flat = x.reshape(-1, x.size(-1))
        y = before(flat) if before else flat
        low = scaled_product(scale, y, a.t())
        product = Weight(weight, weight_scale).product
        out, own_low = summed_product(division, product, y, weight.size(0), LowRank(low, b.t()))
        ctx.save_for_backward(flat, weight, weight_scale, own_low)
        ctx.adapter = a, b  # not saved tensors, see posttrain.ops.fused_lora
        ctx.scale = scale
        ctx.shape = x.shape
        ctx.before = before
        ctx.division = division
        return out.view(-1, *x.shape[1:-1], weight.size(0))

    @staticmethod
    def backward(
        ctx: Context, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, torch.Tensor, torch.Tensor, None, None, None]:
        """Gradients of x, A and B."""
        flat, weight, weight_scale, own_low = ctx.saved_tensors
        a, b = ctx.adapter
        upstream = upstream.reshape(-1, upstream.size(-1))
        grad_b = weight_gradient(b, upstream.t(), own_low)
        gradient = Weight(weight, weight_scale).gradient_product()
        grad_y, down = gathered_product(ctx.division, gradient, upstream, weight.size(1), ctx.scale, b, a)
        grad_x, y = backward_through(ctx.before, grad_y, flat)
        grad_a = weight_gradient(a, down.t(), y)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None
