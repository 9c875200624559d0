"""A frozen linear layer that tensor parallelism divides, and its LoRA, as one operation.

Megatron-Bridge computes the adapter beside the layer: each gathers the same input, and the adapter sums and gathers its
own output. Since both are linear, the adapter can ride along instead. A layer with divided outputs gathers its input
once; in the backward pass the input's gradient of both is one partial sum. A layer with divided inputs adds its part of
the adapter's product to its own before the sum over processes. That requires the rank-r matrix that the adapter divides
on the undivided side whole on each process; `whole_matrices` gathers those of a model at once, and sums their gradients
at once.

With sequence parallelism (arXiv 2205.05198) the undivided side holds a part of the tokens on each process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from posttrain.ops.fp8_linear import Weight
from posttrain.ops.recomputed_norms import Activation, Norm, backward_through

type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given


@dataclass(frozen=True)
class Division:
    """How tensor parallelism divides a layer.

    Attributes:
        group: of the processes.
        sequence: whether the undivided side's tokens are divided instead.
    """

    group: dist.ProcessGroup
    sequence: bool

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """Own tokens [t/n, k] -> all tokens [t, k]."""
        if not self.sequence:
            return own
        (whole,) = gather([own.contiguous()], self.group)
        return whole

    def sums(self, *partial: torch.Tensor) -> list[torch.Tensor]:
        """Parts of sums over the processes, each [t, k], which are overwritten -> [t/n, k] or [t, k]."""
        if self.sequence:
            return reduce_scatter(list(partial), self.group)
        with together(self.group, partial[0].device):
            for part in partial:
                dist.all_reduce(part, group=self.group)
        return list(partial)


@contextmanager
def together(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Communicate in one operation what is asked for inside, which must be of one kind."""
    if device.type != "cuda":  # Gloo has no such operation
        yield
        return
    with _coalescing_manager(group):
        yield


def gather(own: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """[k, ...] of each process -> [n k, ...], for each tensor."""
    size = group.size()
    whole = []
    for tensor in own:
        whole.append(tensor.new_empty(tensor.size(0) * size, *tensor.shape[1:]))
    with together(group, own[0].device):
        for tensor, result in zip(own, whole, strict=True):
            dist.all_gather_into_tensor(result, tensor, group=group)
    return whole


def reduce_scatter(partial: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """[n k, ...] of each process -> own [k, ...] of the sum, for each tensor."""
    size = group.size()
    sums = []
    for tensor in partial:
        sums.append(tensor.new_empty(tensor.size(0) // size, *tensor.shape[1:]))
    with together(group, partial[0].device):
        for tensor, result in zip(partial, sums, strict=True):
            dist.reduce_scatter_tensor(result, tensor.contiguous(), group=group)
    return sums


class WholeMatrices(torch.autograd.Function):
    """Matrices divided along their first dimension -> whole ones.

    With sequence parallelism each process's gradient of a whole one is of its own tokens; else it is of all.
    """

    @staticmethod
    def forward(ctx: Context, division: Division, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each [k, m] -> [n k, m]."""
        ctx.division = division
        return tuple(gather(list(own), division.group))

    @staticmethod
    def backward(ctx: Context, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each [n k, m] -> [k, m]."""
        division: Division = ctx.division
        if division.sequence:
            return (None, *reduce_scatter(list(upstream), division.group))
        size, rank = division.group.size(), division.group.rank()
        return (None, *(gradient.chunk(size)[rank] for gradient in upstream))


def scaled_product(scale: float, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """scale one other of [t, k] and [k, n], the scale part of the product."""
    return torch.addmm(one.new_empty(other.size(1)), one, other, beta=0, alpha=scale)


def weight_gradient(weight: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The gradient one other of an adapter's matrix, [m, t] and [t, n].

    Where Megatron keeps its sum over micro-batches in fp32, the product adds to that itself, unrounded, and what is
    returned is a placeholder that Megatron's data parallelism discards (`grad_added_to_main_grad`).
    """
    total = getattr(weight, "main_grad", None)
    if total is None or not total.is_cuda or total.dtype != torch.float32:
        return one @ other
    torch.addmm(total, one, other, out_dtype=torch.float32, out=total)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


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
        partial = Weight(weight, weight_scale).product(y)
        partial.addmm_(low, b.t())
        out, low = division.sums(partial, low)
        ctx.save_for_backward(flat, weight, weight_scale, a, b, low)
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
        flat, weight, weight_scale, a, b, low = ctx.saved_tensors
        upstream = upstream.reshape(-1, upstream.size(-1))
        grad_b = weight_gradient(b, upstream.t(), low)
        upstream = ctx.division.whole(upstream)
        down = scaled_product(ctx.scale, upstream, b)
        grad_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_x = Weight(weight, weight_scale).gradient(upstream)
            grad_x.addmm_(down, a)
        grad_x, y = backward_through(ctx.before, grad_x, flat)
        grad_a = weight_gradient(a, down.t(), y)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None
