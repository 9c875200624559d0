"""What is done to a linear layer's input first, cheap enough to be done again in the backward pass.

A norm or an activation is a pass over memory, its output as large as any other activation: keeping the input alone
saves a fifth of a LoRA run's activations for about one hundredth of its time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from posttrain.ops.low_rank import LowRank


@dataclass(frozen=True)
class Norm:
    """RMSNorm (shift None) or LayerNorm over the last dimension, with frozen weights.

    Attributes:
        gamma: the gains, or with `offset` their difference from it.
    """

    gamma: torch.Tensor
    eps: float
    shift: torch.Tensor | None = None
    offset: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [t, n], not differentiable on a GPU."""
        if not x.is_cuda:
            return self.differentiable(x)
        from posttrain.ops.norm_kernels import norm

        return norm(x.contiguous(), self.gamma, self.shift, self.eps, self.offset)

    def differentiable(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [..., n], in fp32 and rounded once."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gains = self.gamma.to(wide) + self.offset
        if self.shift is None:
            return F.rms_norm(x.to(wide), (x.size(-1),), gains, self.eps).to(x.dtype)
        return F.layer_norm(x.to(wide), (x.size(-1),), gains, self.shift.to(wide), self.eps).to(x.dtype)

    def backward(self, upstream: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of x, and the output again."""
        if x.is_cuda:
            from posttrain.ops.norm_kernels import norm_backward

            return norm_backward(upstream, x.contiguous(), self.gamma, self.shift, self.eps, self.offset)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.differentiable(x)
        return torch.autograd.grad(y, x, upstream)[0], y.detach()


type Function = Literal["silu", "gelu_tanh", "gelu"]
FUNCTIONS: dict[Function, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class Activation:
    """function(x + bias) of [t, f], or function(gate) * up of x + bias [t, 2 f], gates first.

    With a gate SwiGLU, or GEGLU with the approximate GELU (arXiv 2002.05202).
    """

    function: Function
    gated: bool = True
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, added: LowRank | None = None) -> torch.Tensor:
        """[t, f] of x + added."""
        if x.is_cuda:
            from posttrain.ops.activation_kernels import activation

            return activation(x, self.function, self.gated, self.bias, added)
        first, up = self._parts(x, added)
        activated = FUNCTIONS[self.function](first)
        return activated if up is None else activated * up

    def backward(
        self,
        upstream: torch.Tensor,
        x: torch.Tensor,
        added: LowRank | None = None,
        upstream_added: LowRank | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of x from upstream + upstream_added, and the output again."""
        if x.is_cuda:
            from posttrain.ops.activation_kernels import activation_backward

            return activation_backward(upstream, x, self.function, self.gated, self.bias, added, upstream_added)
        if upstream_added:
            upstream = upstream_added.added_to(upstream)
        first, up = self._parts(x, added)
        with torch.enable_grad():
            first = first.detach().requires_grad_()
            activated = FUNCTIONS[self.function](first)
        through = upstream if up is None else upstream * up
        (gradient,) = torch.autograd.grad(activated, first, through)
        activated = activated.detach()
        if up is None:
            return gradient, activated
        return torch.cat([gradient, upstream * activated], dim=-1), activated * up

    def _parts(self, x: torch.Tensor, added: LowRank | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the function is of, and what it is multiplied with."""
        if added:
            x = added.added_to(x)
        if self.bias is not None:
            x = x + self.bias
        if not self.gated:
            return x, None
        gate, up = x.chunk(2, dim=-1)
        return gate, up


def backward_through(
    before: Norm | Activation | None, upstream: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gradient of x, None without an upstream one, and before(x) again."""
    if before is None:
        return upstream, x
    if upstream is None:
        return None, before(x)
    return before.backward(upstream, x)
