"""Attention with soft-capped scores over packed sequences, by kernels of its own (capped_kernels.py). Only on a GPU.

Nothing here asks the device for a number, and every shape follows from the row's length, so that a step can be captured
in a CUDA graph, what each query sees included.
"""

from dataclasses import dataclass
from typing import Any

import torch

from posttrain.ops.capped_limits import HIGHEST_CAP, WIDEST_HEAD

MOST_NUMBERS = 2**31 - 1  # of the queries, whose places the kernels count in 32 bits

type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given


@dataclass(frozen=True)
class Visible:
    """What the queries of a row see: each the keys of a range that ends at its own place.

    Attributes:
        first: int32[t], non-decreasing: the first key that each query sees.
        last: int32[t], the end of the queries that see each key.
    """

    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def from_first(cls, first: torch.Tensor) -> "Visible":
        """Of `first` alone."""
        key = torch.arange(first.numel(), dtype=torch.int32, device=first.device)
        return cls(first, torch.searchsorted(first, key, right=True, out_int32=True))


class CappedAttention(torch.autograd.Function):
    """softmax(softcap tanh(QK^T scale / softcap)) V."""

    @staticmethod
    def forward(
        ctx: Context,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        softcap: float,
        scale: float,
    ) -> torch.Tensor:
        """See `attend`."""
        from posttrain.ops import capped_kernels

        states = (query.contiguous(), key.contiguous(), value.contiguous())
        out, logs = capped_kernels.forward(*states, visible.first, softcap, scale)
        ctx.save_for_backward(*states, out, logs, visible.first, visible.last)
        ctx.numbers = softcap, scale
        return out

    @staticmethod
    def backward(ctx: Context, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        from posttrain.ops import capped_kernels

        gradients = capped_kernels.backward(upstream.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return *gradients, None, None, None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible, softcap: float, scale: float
) -> torch.Tensor:
    """softmax(softcap tanh(QK^T scale / softcap)) V over the keys that each query sees; see `is_possible`.

    Args:
        query: [t, heads, d].
        key: [t, groups, d].
        value: as key.
        visible: which keys each query sees.
        softcap: what scores are squashed to.
        scale: of the scores.

    Returns:
        [t, heads, d].
    """
    out: torch.Tensor = CappedAttention.apply(query, key, value, visible, softcap, scale)
    return out


def is_possible(query: torch.Tensor, softcap: float) -> bool:
    """Whether the kernels can compute it: the exponentials of scores must be in the number format's range."""
    in_range = softcap <= HIGHEST_CAP and query.dtype in (torch.bfloat16, torch.float32)
    return query.is_cuda and in_range and query.size(-1) <= WIDEST_HEAD and query.numel() <= MOST_NUMBERS
