"""A frozen linear layer and its LoRA as one operation, for one process's whole matrices in bf16 or fp32.

Megatron-Bridge computes the adapter beside the layer: the product is scaled, added to the layer's output, and in the
backward pass added to the layer's input gradient, each a pass over a [tokens, features] tensor. Here the scale is
applied to the rank-r product, and both sums happen in the matrix products themselves (addmm).
"""

import torch
import torch.nn.functional as F
from megatron.bridge.peft.lora_layers import LoRALinear


class FrozenLinearWithLoRA(torch.autograd.Function):
    """y = x W^T + scale (x A^T) B^T with W frozen."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale: float):
        """x [..., in], weight [out, in], a [rank, in], b [out, rank] -> [..., out]."""
        flat = x.reshape(-1, x.size(-1))
        low = flat @ a.t()
        low *= scale
        out = flat @ weight.t()
        out.addmm_(low, b.t())
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx, upstream):
        """Gradients of x, A and B."""
        flat, weight, a, b, low = ctx.saved_tensors
        upstream = upstream.reshape(-1, upstream.size(-1))
        down = upstream @ b
        down *= ctx.scale
        grad_a, grad_b = down.t() @ flat, upstream.t() @ low
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = upstream @ weight
            grad_x.addmm_(down, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_a, grad_b, None


class FusedLoRALinear(LoRALinear):
    """Megatron-Bridge's LoRALinear, computed as one operation where that is the same thing."""

    def forward(self, x, *args, **kwargs):
        """As LoRALinear: (output, bias that the caller adds or None)."""
        if not self._fusable():
            return super().forward(x, *args, **kwargs)
        base, adapter = self.to_wrap, self.adapter
        y = FrozenLinearWithLoRA.apply(
            normalised(base, x), base.weight, adapter.linear_in.weight, adapter.linear_out.weight,
            adapter.alpha / adapter.dim,
        )  # fmt: skip
        bias = getattr(base, "bias", None)
        if bias is None or not bias.numel():
            return y, None
        if getattr(base, "te_return_bias", False) or getattr(base, "skip_bias_add", False):
            return y, bias
        return y + bias, None

    def _fusable(self) -> bool:
        """One process's whole matrix, frozen, not quantised, its adapter enabled and without dropout."""
        base, adapter = self.to_wrap, self.adapter
        config = base.config
        return (
            self._adapter_enabled
            and config.tensor_model_parallel_size == 1
            and not config.fp8
            and not config.cpu_offloading
            and not adapter.is_expert
            and not base.weight.requires_grad
            and not (adapter.training and getattr(adapter.dropout, "p", 0.0) > 0)
        )


def normalised(base: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's input: normalised first where Transformer Engine has norm and linear in one module."""
    gamma = getattr(base, "layer_norm_weight", None)
    if gamma is None:
        return x
    if base.zero_centered_gamma:
        gamma = gamma + 1
    if base.normalization == "RMSNorm":
        return F.rms_norm(x, (x.size(-1),), gamma, base.eps)
    return F.layer_norm(x, (x.size(-1),), gamma, base.layer_norm_bias, base.eps)


def fuse(module: torch.nn.Module) -> torch.nn.Module:
    """`module`, computed as one operation from now on if it is a plain LoRALinear with plain adapters."""
    if type(module) is LoRALinear and all(hasattr(module.adapter, name) for name in ("linear_in", "linear_out")):
        module.__class__ = FusedLoRALinear
    return module
