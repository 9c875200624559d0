"""A frozen linear layer and its LoRA as one operation, also where tensor parallelism divides them.

Megatron-Bridge computes the adapter beside the layer: the product is scaled, added to the layer's output, and in the
backward pass added to the layer's input gradient, each a pass over a [tokens, features] tensor. Here the scale is
applied to the rank-r product, and both sums happen in the matrix products themselves (addmm). What comes before the
layer, its norm or the MLP's activation, belongs to the operation too and is computed again in the backward pass.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from megatron.bridge.peft.lora_layers import LoRALinear

from posttrain.ops.division import WHOLE, Division, read_each_other
from posttrain.ops.fp8_linear import EightBitWeight, Weight
from posttrain.ops.low_rank import LowRank, scaled_product, weight_gradient
from posttrain.ops.parallel_lora import (
    Context,
    RowParallelWithLoRA,
    WholeMatrices,
    gathered_product,
    summed_product,
)
from posttrain.ops.recomputed_norms import Activation, Norm, backward_through


class FrozenLinearWithLoRA(torch.autograd.Function):
    """y = f(x) W^T + scale (f(x) A^T) B^T with W and f frozen; f is computed again in the backward pass.

    Whole, or of n processes with divided outputs; for divided inputs see posttrain.ops.parallel_lora.
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
        before: Norm | Activation | None = None,
        division: Division = WHOLE,
    ) -> torch.Tensor:
        """Compute y.

        Args:
            x: [t, ..., in'], of own tokens where these are divided.
            weight: [out/n, in].
            weight_scale: of an 8-bit weight, [out/n].
            a: [rank, in], whole.
            b: [out/n, rank].
            scale: alpha / rank.
            before: f, in' -> in.
            division: over n processes.

        Returns:
            [t, ..., out/n], of all tokens.
        """
        flat = x.reshape(-1, x.size(-1))
        y = before(flat) if before else flat
        product = Weight(weight, weight_scale).product
        out, low = gathered_product(division, product, y, weight.size(0), scale, a.t(), b.t())
        ctx.save_for_backward(flat, weight, weight_scale, low)
        # Themselves, with Megatron's sums: what hooks of saved tensors hand back is a tensor without them.
        ctx.adapter = a, b
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
        flat, weight, weight_scale, low = ctx.saved_tensors
        a, b = ctx.adapter
        upstream = upstream.reshape(-1, upstream.size(-1))
        down = scaled_product(ctx.scale, upstream, b)
        grad_b = weight_gradient(b, upstream.t(), low)
        grad_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            gradient = Weight(weight, weight_scale).gradient_product()
            grad_x, own_down = summed_product(ctx.division, gradient, upstream, weight.size(1), LowRank(down, a))
        else:
            own_down = ctx.division.sum(down)
        grad_x, y = backward_through(ctx.before, grad_x, flat)
        grad_a = weight_gradient(a, own_down.t(), y)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None


class FusedLoRALinear(LoRALinear):
    """Megatron-Bridge's LoRALinear, computed as one operation where that is the same thing.

    Attributes:
        recompute: whether norm and activation are computed again in the backward pass instead of kept.
        overlap: whether tensor parallelism's exchanges are hidden behind products.
        whole: the matrix of the adapter's that tensor parallelism divides on the layer's undivided side, gathered for
            this forward pass; None: it is not divided, or each layer gathers its own.
    """

    recompute = True
    overlap = True
    whole: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As LoRALinear: (output, bias that the caller adds or None)."""
        if not self.fusable():
            return super().forward(x, *args, **kwargs)
        return self.apply_fused(*self.norm_first(x))

    def norm_first(self, x: torch.Tensor) -> tuple[torch.Tensor, Norm | None]:
        """The operation's input, and the norm that belongs to it: None where it is trained or not computed again."""
        norm = norm_of(self.to_wrap)
        if norm and (norm.gamma.requires_grad or not self.recompute):
            return norm.differentiable(x), None
        return x, norm

    def apply_fused(
        self, x: torch.Tensor, before: Norm | Activation | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The operation on x, with `before` applied first; see FrozenLinearWithLoRA."""
        division = self.divided
        operation: type[torch.autograd.Function] = FrozenLinearWithLoRA
        if division.group and self.divides_inputs:
            operation = RowParallelWithLoRA
        weight = self.layer_weight
        a, b = self.matrices
        return self.with_bias(operation.apply(x, weight.data, weight.scale, a, b, self.lora_scale, before, division))

    def with_bias(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output y, and the bias that the caller adds."""
        base, bias = self.to_wrap, self.layer_bias
        if bias is None or getattr(base, "te_return_bias", False) or getattr(base, "skip_bias_add", False):
            return y, bias
        return y + bias, None

    @property
    def layer_bias(self) -> torch.Tensor | None:
        """The layer's; Transformer Engine's without one has an empty one."""
        bias: torch.Tensor | None = getattr(self.to_wrap, "bias", None)
        return bias if bias is not None and bias.numel() else None

    @property
    def layer_weight(self) -> Weight:
        """The layer's weight."""
        weight = self.to_wrap.weight
        return weight.weight if isinstance(weight, EightBitWeight) else Weight(weight)

    @property
    def lora_scale(self) -> float:
        """Of the adapter's product."""
        return float(self.adapter.alpha / self.adapter.dim)

    @property
    def divides_inputs(self) -> bool:
        """Whether tensor parallelism divides the layer's inputs, else its outputs."""
        return bool(self.adapter.input_is_parallel)

    @cached_property
    def divided(self) -> Division:
        """How tensor parallelism divides the layer."""
        group = self.adapter.tp_group
        if group is None or group.size() == 1:
            return WHOLE
        sequence = bool(self.to_wrap.config.sequence_parallel)
        overlap = sequence and self.overlap and self.to_wrap.weight.is_cuda and read_each_other(group)
        return Division(group, sequence, overlap)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter's A and B as the operation takes them: divided only as the layer is."""
        a, b = self.adapter.linear_in.weight, self.adapter.linear_out.weight
        if self.divided.group is None:
            return a, b
        if self.divides_inputs:
            return a, self.whole_matrix()
        return self.whole_matrix(), b

    @property
    def own_matrix(self) -> torch.Tensor:
        """This process's part of the adapter's matrix on the layer's undivided side."""
        side = self.adapter.linear_out if self.divides_inputs else self.adapter.linear_in
        weight: torch.Tensor = side.weight
        return weight

    def whole_matrix(self) -> torch.Tensor:
        """That matrix, whole."""
        if self.whole is not None:
            return self.whole
        whole: torch.Tensor = WholeMatrices.apply(self.divided.group, self.divided.sequence, self.own_matrix)[0]
        return whole

    def fusable(self) -> bool:
        """A frozen matrix, its adapter enabled and without dropout."""
        base, adapter = self.to_wrap, self.adapter
        config = base.config
        return (
            self._adapter_enabled
            and adapter.base_linear_is_parallel
            and getattr(base, "parallel_mode", "") is not None  # an expert that communicates elsewhere
            and not config.fp8
            and not config.cpu_offloading
            and not adapter.is_expert
            and not base.weight.requires_grad
            and not (adapter.training and getattr(adapter.dropout, "p", 0.0) > 0)
        )


def norm_of(base: Any) -> Norm | None:
    """The norm that Transformer Engine has in one module with the layer `base`, None where there is none."""
    gamma = getattr(base, "layer_norm_weight", None)
    if gamma is None:
        return None
    shift = None if base.normalization == "RMSNorm" else base.layer_norm_bias
    return Norm(gamma, base.eps, shift, offset=float(base.zero_centered_gamma))


def fuse(module: torch.nn.Module, overlap: bool) -> torch.nn.Module:
    """`module`, as one operation if Megatron-Bridge has just wrapped it as a plain LoRALinear with a plain pair."""
    if type(module) is not LoRALinear:
        return module
    if not (hasattr(module.adapter, "linear_in") and hasattr(module.adapter, "linear_out")):
        return module
    fused = FusedLoRALinear(module.to_wrap, module.adapter)
    fused.overlap = overlap
    return fused


class Gather:
    """Hooks of a model's forward pass: before it, gather what its layers divide, all in one operation."""

    def __init__(self, layers: list[FusedLoRALinear]) -> None:
        self.layers = layers

    @classmethod
    def attach(cls, model: list[torch.nn.Module]) -> None:
        """Add them to each part of a model whose layers are divided."""
        for part in model:
            layers = []
            for layer in fused_layers([part]):
                if layer.divided.group:
                    layers.append(layer)
            if layers:
                hooks = cls(layers)
                part.register_forward_pre_hook(hooks.gather)
                part.register_forward_hook(hooks.release)

    def gather(self, model: torch.nn.Module, inputs: object) -> None:
        """Gather the matrices, before."""
        division = self.layers[0].divided
        own = [layer.own_matrix for layer in self.layers]
        whole = WholeMatrices.apply(division.group, division.sequence, *own)
        for layer, matrix in zip(self.layers, whole, strict=True):
            layer.whole = matrix

    def release(self, model: torch.nn.Module, inputs: object, output: object) -> None:
        """Let go of them, after, so that the pass's tensors end with it."""
        for layer in self.layers:
            layer.whole = None


def fused_layers(model: list[torch.nn.Module]) -> list[FusedLoRALinear]:
    """The layers of a model's parts that are computed as one operation."""
    layers = [module for module in modules_of(model) if isinstance(module, FusedLoRALinear)]
    return [layer for layer in layers if layer.fusable()]


def modules_of(model: list[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """Every module of a model's parts."""
    for part in model:
        yield from part.modules()
