"""A layer's frozen experts with the adapters that they share, also where the experts are divided over processes.

Each of n processes has its own t tokens and an n-th of the experts. It gathers the group's n t tokens with their
choices, computes the rows of its experts (posttrain.ops.grouped_experts), and the sums over each token's experts are
scattered back to the token's process; the backward pass is the mirror image. Every process may get as many rows as all
tokens have choices, so every shape is known, nothing is dropped, no host asks a device, and the step can be captured.

Both adapters are linear, so what travels for them is of their rank alone: the first's narrow product is computed where
the token is, and gathered; the second's is computed of each process's part of the sum of h, and summed up. A process's
gradients of the adapters are of a part of all that they are; their sum over the group is the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from posttrain.ops.division import gather, reduce_scatter
from posttrain.ops.grouped_experts import ExpertWeights, Routing, frozen_experts

type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given


class Gather(torch.autograd.Function):
    """Tensors [t, ...] of each process -> [n t, ...]; the gradients' sums go back to where the tensors are from."""

    @staticmethod
    def forward(ctx: Context, group: dist.ProcessGroup, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In one operation; tensors of integers have no gradient."""
        ctx.group = group
        whole = gather([tensor.contiguous() for tensor in own], group)
        ctx.mark_non_differentiable(*(tensor for tensor in whole if not tensor.is_floating_point()))
        return tuple(whole)

    @staticmethod
    def backward(ctx: Context, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each [n t, ...] -> the sum's own [t, ...]."""
        return None, *of_needed(reduce_scatter, upstream, ctx.needs_input_grad[1:], ctx.group)


class ScatterSums(torch.autograd.Function):
    """Tensors [n t, ...], of which each process has a part of the sum -> the sum's own [t, ...]."""

    @staticmethod
    def forward(ctx: Context, group: dist.ProcessGroup, *partial: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In one operation."""
        ctx.group = group
        return tuple(reduce_scatter(list(partial), group))

    @staticmethod
    def backward(ctx: Context, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each [t, ...] -> [n t, ...]."""
        own = [gradient.contiguous() for gradient in upstream]
        return None, *of_needed(gather, own, ctx.needs_input_grad[1:], ctx.group)


def of_needed(
    exchange: Callable[[list[torch.Tensor], dist.ProcessGroup], list[torch.Tensor]],
    gradients: Sequence[torch.Tensor],
    needed: Sequence[bool],
    group: dist.ProcessGroup,
) -> list[torch.Tensor | None]:
    """Exchange the gradients that somebody asks for, in one operation; None for the others."""
    results: list[torch.Tensor | None] = [None] * len(needed)
    places = [place for place, wanted in enumerate(needed) if wanted]
    for place, result in zip(places, exchange([gradients[place] for place in places], group), strict=True):
        results[place] = result
    return results


@dataclass(frozen=True)
class Exchange:
    """What the processes that the experts are divided over exchange; here nothing, for all tokens are here.

    Attributes:
        size: processes, each with as many experts.
        rank: which of them this is.
    """

    size: int = 1
    rank: int = 0

    def gather(self, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors [t, ...] of each process -> [n t, ...]."""
        return own

    def sums(self, *partial: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sums over the processes of tensors [n t, ...] -> own [t, ...]."""
        return partial


@dataclass(frozen=True)
class GroupExchange(Exchange):
    """The exchange of a group, whose processes have t tokens each."""

    group: dist.ProcessGroup | None = None

    def gather(self, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By one all-gather."""
        whole: tuple[torch.Tensor, ...] = Gather.apply(self.group, *own)
        return whole

    def sums(self, *partial: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By one reduce-scatter."""
        own: tuple[torch.Tensor, ...] = ScatterSums.apply(self.group, *partial)
        return own


def exchange_of(group: dist.ProcessGroup | None) -> Exchange:
    """The exchange of a group; in a single process there is none."""
    if group is None or group.size() == 1:
        return Exchange()
    return GroupExchange(group.size(), group.rank(), group)


@dataclass(frozen=True)
class SharedAdapter:
    """The LoRA that a matrix of all experts shares: `a` [rank, in], `b` [out, rank], `scale`."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def low(self, x: torch.Tensor) -> torch.Tensor:
        """The first product, scaled: [t, in] -> [t, rank]."""
        return F.linear(x, self.a) * self.scale


@dataclass(frozen=True)
class Arrivals:
    """The tokens of a group, as the experts of one process take them.

    Attributes:
        x: [n t, in].
        low: [n t, rank], of the first matrix's adapter; None: it has none.
        probabilities: [n t, experts here].
        routing: to the experts here.
    """

    x: torch.Tensor
    low: torch.Tensor | None
    probabilities: torch.Tensor
    routing: Routing


def adapted_experts(
    x: torch.Tensor,
    probabilities: torch.Tensor,
    chosen: torch.Tensor,
    k: int,
    weights: tuple[ExpertWeights, ExpertWeights],
    adapters: tuple[SharedAdapter | None, SharedAdapter | None],
    exchange: Exchange,
) -> torch.Tensor:
    """The sum over a token's experts of (W2 + s2 B2 A2) h, h = p silu(gate) up, (gate, up) = (W1 + s1 B1 A1) x.

    Args:
        x: [t, in].
        probabilities: p, [t, all experts], used where a token goes.
        chosen: bool[t, all experts], k in each row.
        k: experts of a token.
        weights: W1 and W2 of the experts on this process, frozen.
        adapters: of W1 and of W2, which all experts share.
        exchange: between the processes that the experts are divided over.

    Returns:
        [t, in].
    """
    first, second = adapters
    low = b = None
    if first is not None:
        low, b = first.low(x), first.b
    arrived = arrivals(x, low, probabilities, chosen, k, exchange)
    y, total = frozen_experts(
        arrived.x, arrived.probabilities, arrived.low, b, *weights, arrived.routing, with_sum=second is not None
    )
    if second is None or total is None:
        return exchange.sums(y)[0]
    y, low = exchange.sums(y, second.low(total))
    return y + F.linear(low, second.b)


def arrivals(
    x: torch.Tensor,
    low: torch.Tensor | None,
    probabilities: torch.Tensor,
    chosen: torch.Tensor,
    k: int,
    exchange: Exchange,
) -> Arrivals:
    """Gather the group's tokens, and where those go that choose an expert of this process; as `adapted_experts`.

    A token brings its k choices and their probabilities, not a number for each expert.
    """
    if exchange.size == 1:
        return Arrivals(x, low, probabilities, Routing.from_map(chosen, k))
    expert = torch.nonzero_static(chosen, size=x.size(0) * k)[:, 1].view(-1, k)
    own = [x, probabilities.gather(1, expert), expert.to(torch.int32)]
    if low is not None:
        own.append(low)
    x, weight, choice, *more = exchange.gather(*own)
    here = chosen.size(1) // exchange.size
    # The last column is of all experts that are elsewhere.
    column = choice.long() - exchange.rank * here
    column = column.masked_fill((column < 0) | (column >= here), here)
    shape = (x.size(0), here + 1)
    local = torch.zeros(shape, dtype=torch.bool, device=x.device).scatter_(1, column, True)
    spread = weight.new_zeros(shape).scatter(1, column, weight)
    routing = Routing.from_map(local[:, :here], min(k, here), partial=True)
    if more:
        (low,) = more
    return Arrivals(x, low, spread[:, :here], routing)
