"""A layer's frozen experts as grouped products, without the host knowing how many tokens each expert gets.

Each token goes to k experts, so t tokens make t k rows whatever the router chooses: every shape is known, and which
rows are whose stays on the device. The step can be captured in a CUDA graph, and no kernel waits for the host.

All experts of a layer share one LoRA for their first matrix and one for their second. Both are linear, so they commute
with sending tokens to experts and summing what comes back: the first is computed once for each token and added to its
rows, the second once for the sum of a token's rows.

Of experts on several processes (posttrain.ops.divided_experts) some of a token's may be elsewhere. Memory is there for
the most rows that can be; those that are absent come last, and nothing is computed of them, nor read or written.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from posttrain.ops.fp8_linear import quantise

type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given


@dataclass(frozen=True)
class Routing:
    """Rows of t tokens' choices, k each or at most k, sorted by expert and then by token.

    Attributes:
        token: int64[t k], of each row; -1: the row is absent, as are all after it.
        expert: int64[t k], of each row; -1 as above.
        rows: int64[t, k], of each token; -1: it has fewer.
        ends: int32[experts], the row after each expert's last.
        partial: whether rows may be absent.
    """

    token: torch.Tensor
    expert: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor
    partial: bool = False

    @property
    def present(self) -> torch.Tensor | None:
        """int64[t k], negative where a row is absent; None: none is."""
        return self.token if self.partial else None

    @classmethod
    def from_map(cls, chosen: torch.Tensor, k: int, partial: bool = False) -> "Routing":
        """Sort without asking the device.

        Args:
            chosen: bool[t, experts], k in each row.
            k: experts of a token.
            partial: a row may have fewer than k.
        """
        tokens = chosen.size(0)
        size = tokens * k
        expert, token = torch.nonzero_static(chosen.t(), size=size, fill_value=-1).t().contiguous()
        nth = chosen.cumsum(1)[token, expert] - 1  # of its token's k rows
        ends = chosen.sum(0).cumsum(0, dtype=torch.int32)
        place = token * k + nth
        order = torch.arange(size, device=chosen.device)
        if not partial:
            rows = torch.empty_like(token).scatter_(0, place, order)
            return cls(token, expert, rows.view(tokens, k), ends)
        # One place more, for the rows that are absent.
        place = place.masked_fill(token < 0, size)
        rows = token.new_full((size + 1,), -1).scatter_(0, place, order)[:size]
        return cls(token, expert, rows.view(tokens, k), ends, partial)


@dataclass(frozen=True)
class ExpertWeights:
    """A frozen matrix of each expert.

    Attributes:
        data: [experts, out, in].
        scale: float32[experts, out], where data is E4M3; else None.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None

    def product(self, x: torch.Tensor, routing: Routing, source: torch.Tensor | None = None) -> torch.Tensor:
        """Each row with its expert's matrix -> [t k, out].

        Args:
            x: [t k, in], or [t, in] with `source`.
            routing: whose the rows are.
            source: int64[t k], of which row of x each is; None: x has them all.
        """
        if self.scale is None:
            rows = x if source is None else taken(x, source, routing.partial)
            return F.grouped_mm(rows, self.data.transpose(1, 2), offs=routing.ends)
        eight, scale = quantise_rows(x, source, present=routing.present)
        return eight_bit_product(eight, scale, self.data, self.scale, routing, x.dtype)

    def gradient(self, upstream: torch.Tensor, routing: Routing, source: torch.Tensor | None = None) -> torch.Tensor:
        """Of the rows [t k, in]; upstream: [t k, out], or [t, out] with `source`."""
        if self.scale is None:
            rows = upstream if source is None else taken(upstream, source, routing.partial)
            return F.grouped_mm(rows, self.data, offs=routing.ends)
        # The sum runs over the matrix's scales, so they are multiplied in first (posttrain.ops.fp8_linear).
        eight, scale = quantise_rows(upstream, source, self.scale, routing.expert, routing.present)
        one = torch.ones_like(self.data[:, 0], dtype=torch.float32)
        return eight_bit_product(eight, scale, transposed(self.data), one, routing, upstream.dtype)


def eight_bit_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    routing: Routing,
    dtype: torch.dtype,
) -> torch.Tensor:
    """E4M3 x [t k, in], scaled by rows, with E4M3 weights [experts, out, in], scaled by outputs -> [t k, out]."""
    if x.is_cuda:
        return torch._scaled_grouped_mm(
            x,
            weights.transpose(1, 2),
            x_scale,
            scales,
            offs=routing.ends,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    rows = (x.float() * x_scale[:, None]).to(dtype)
    exact = (weights.float() * scales[:, :, None]).to(dtype)
    return F.grouped_mm(rows, exact.transpose(1, 2), offs=routing.ends)


def quantise_rows(
    values: torch.Tensor,
    source: torch.Tensor | None,
    columns: torch.Tensor | None = None,
    expert: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to E4M3 with a scale per row.

    Args:
        values: [t, n].
        source: int64[r], which of them become rows; None: all in order.
        columns: [experts, n], those of a row's expert are multiplied in first; None: nothing is.
        expert: int64[r], of each row, with `columns`.
        present: int64[r], negative where a row is absent and its result not written; None: none is.

    Returns:
        float8_e4m3fn[r, n], and the scales float32[r] to multiply its rows with.
    """
    if values.is_cuda:
        from posttrain.ops.expert_kernels import quantise_rows as kernel

        return kernel(values, source, columns, expert, present)
    rows = values if source is None else values[source]
    if columns is not None and expert is not None:
        rows = rows.float() * columns[expert]
    return quantise(rows)


def taken(values: torch.Tensor, source: torch.Tensor, partial: bool) -> torch.Tensor:
    """The rows int64[r] of [t, n] -> [r, n]; with `partial`, negative ones are absent and not written."""
    if not partial:
        return values.index_select(0, source)
    if values.is_cuda:
        from posttrain.ops.expert_kernels import take_rows

        return take_rows(values, source)
    return values[source]


def transposed(weights: torch.Tensor) -> torch.Tensor:
    """[experts, m, n] of one-byte numbers -> [experts, n, m], contiguous."""
    if weights.is_cuda:
        from posttrain.ops.expert_kernels import transpose

        return transpose(weights)
    return weights.transpose(1, 2).contiguous()


class FrozenExperts(torch.autograd.Function):
    """The operation of `frozen_experts`; keeps W1's products for the backward pass, neither the tokens' rows nor h."""

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        probabilities: torch.Tensor,
        low: torch.Tensor | None,
        b: torch.Tensor | None,
        first: ExpertWeights,
        second: ExpertWeights,
        routing: Routing,
        with_sum: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `frozen_experts`."""
        places = places_of(probabilities, routing)
        if routing.partial:
            places = places.clamp(min=0)
        weight = probabilities.reshape(-1).index_select(0, places)
        both = first.product(x, routing, routing.token)
        h = weighted_swiglu(both, added_to_tokens(low, b), routing.token, weight, routing.partial)
        y = sum_rows(second.product(h, routing), routing.rows, routing.partial)
        ctx.save_for_backward(both, low, b, weight)
        ctx.weights = first, second
        ctx.routing = routing
        ctx.probabilities = probabilities.shape, probabilities.dtype
        return y, sum_rows(h, routing.rows, routing.partial) if with_sum else None

    @staticmethod
    def backward(
        ctx: Context, upstream: torch.Tensor, upstream_of_sum: torch.Tensor | None
    ) -> tuple[
        torch.Tensor | None,
        torch.Tensor,
        torch.Tensor | None,
        torch.Tensor | None,
        None,
        None,
        None,
        None,
    ]:
        """Gradients of x, the probabilities, L and B."""
        both, low, b, weight = ctx.saved_tensors
        first, second = ctx.weights
        routing = ctx.routing
        grad_h = second.gradient(upstream, routing, routing.token)
        added = added_to_tokens(low, b)
        grad_both, grad_weight = weighted_swiglu_backward(
            grad_h, upstream_of_sum, both, added, routing.token, weight, routing.partial
        )
        grad_x = grad_low = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = sum_rows(first.gradient(grad_both, routing), routing.rows, routing.partial)
        if low is not None:
            grad_added = sum_rows(grad_both, routing.rows, routing.partial)
            grad_low = grad_added @ b
            grad_b = grad_added.t() @ low
        shape, dtype = ctx.probabilities
        grad_probabilities = spread(grad_weight.to(dtype), shape, routing)
        return grad_x, grad_probabilities, grad_low, grad_b, None, None, None, None


def frozen_experts(
    x: torch.Tensor,
    probabilities: torch.Tensor,
    low: torch.Tensor | None,
    b: torch.Tensor | None,
    first: ExpertWeights,
    second: ExpertWeights,
    routing: Routing,
    with_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = sum over a token's experts of W2 h, h = p silu(gate) up, (gate, up) = W1 x + B L; W1 and W2 frozen.

    Args:
        x: [t, in].
        probabilities: p, [t, experts], used where a token goes.
        low: L, [t, rank], of the adapter that W1 of all experts share; None: there is none.
        b: B, [2 inner, rank], with `low`.
        first: W1, [experts, 2 inner, in], gates first.
        second: W2, [experts, in, inner].
        routing: where tokens go; to fewer experts, or none, where the others are elsewhere.
        with_sum: whether to sum up h as well.

    Returns:
        y [t, in], and the sum of h over a token's experts [t, inner] or None.
    """
    results: tuple[torch.Tensor, torch.Tensor | None]
    results = FrozenExperts.apply(x, probabilities, low, b, first, second, routing, with_sum)
    return results


def added_to_tokens(low: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """[t, 2 inner]: what an adapter adds to all rows of a token, None without one."""
    if low is None or b is None:
        return None
    return low @ b.t()


def places_of(probabilities: torch.Tensor, routing: Routing) -> torch.Tensor:
    """int64[t k]: each row's place in the flattened probabilities [t, experts]; negative where it is absent."""
    return routing.token * probabilities.size(1) + routing.expert


def spread(weights: torch.Tensor, shape: torch.Size, routing: Routing) -> torch.Tensor:
    """Weights of rows [t k] at their places in [t, experts], zeros elsewhere."""
    whole = weights.new_zeros(shape.numel() + 1)  # the last place is of the rows that are absent
    probabilities = whole[:-1].view(shape)
    places = places_of(probabilities, routing)
    if routing.partial:
        places = places.masked_fill(places < 0, shape.numel())
    whole.scatter_(0, places, weights)
    return probabilities


def weighted_swiglu(
    both: torch.Tensor,
    added: torch.Tensor | None,
    token: torch.Tensor,
    weight: torch.Tensor,
    partial: bool = False,
) -> torch.Tensor:
    """weight silu(gate) up -> [r, f].

    Args:
        both: [r, 2 f], gates first.
        added: [t, 2 f], to the rows of each token first; None: nothing.
        token: int64[r]; with `partial`, negative where a row is absent and its result not written.
        weight: [r].
        partial: whether rows may be absent.
    """
    if both.is_cuda:
        from posttrain.ops.expert_kernels import weighted_swiglu as kernel

        return kernel(both, added, token, weight, partial)
    if added is not None:
        both = both + added[token]
    gate, up = both.chunk(2, dim=-1)
    return (weight[:, None] * F.silu(gate) * up).to(both.dtype)


def weighted_swiglu_backward(
    upstream: torch.Tensor,
    upstream_of_sum: torch.Tensor | None,
    both: torch.Tensor,
    added: torch.Tensor | None,
    token: torch.Tensor,
    weight: torch.Tensor,
    partial: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `both` (and of a row of `added`) and of `weight`, float32.

    Args:
        upstream: of the result, [r, f].
        upstream_of_sum: of the sum of a token's results, [t, f]; None: there is none.
        both, added, token, weight, partial: as given to `weighted_swiglu`.
    """
    if both.is_cuda:
        from posttrain.ops.expert_kernels import weighted_swiglu_backward as kernel

        return kernel(upstream, upstream_of_sum, both, added, token, weight, partial)
    if upstream_of_sum is not None:
        upstream = upstream + upstream_of_sum[token]
    if added is not None:
        both = both + added[token]
    gate, up = both.chunk(2, dim=-1)
    silu = F.silu(gate)
    grad_weight = (upstream * silu * up).float().sum(1)
    upstream = upstream * weight[:, None].to(upstream.dtype)
    grad_gate = torch.ops.aten.silu_backward(upstream * up, gate)
    return torch.cat([grad_gate, upstream * silu], dim=-1), grad_weight


def sum_rows(values: torch.Tensor, rows: torch.Tensor, partial: bool = False) -> torch.Tensor:
    """The sum of each token's rows, in the same order every time.

    Args:
        values: [r, n].
        rows: int64[t, k]; with `partial`, negative where a token has fewer.
        partial: whether tokens may have fewer than k rows.

    Returns:
        [t, n].
    """
    if values.is_cuda:
        from posttrain.ops.expert_kernels import sum_rows as kernel

        return kernel(values, rows, partial)
    chosen = values[rows]
    if partial:
        chosen = chosen.masked_fill(rows[:, :, None] < 0, 0)
    return chosen.sum(1)
