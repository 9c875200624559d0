"""Products of an adapter's narrow matrices."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """What is added to a tensor [t, n] where that is read next, and never written by itself: left right.

    Attributes:
        left: [t, rank].
        right: [rank, n], of any strides.
    """

    left: torch.Tensor
    right: torch.Tensor

    def added_to(self, values: torch.Tensor) -> torch.Tensor:
        """values + left right, a new tensor."""
        return torch.addmm(values, self.left, self.right)


def scaled_product(
    scale: float, one: torch.Tensor, other: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """scale one other of [t, k] and [k, n], the scale part of the product; into `out`."""
    return torch.addmm(one.new_empty(other.size(1)), one, other, beta=0, alpha=scale, out=out)


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
