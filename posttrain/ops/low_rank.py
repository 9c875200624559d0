"""A product of two narrow matrices that is never written by itself."""

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
