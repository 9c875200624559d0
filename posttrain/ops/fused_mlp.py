"""A frozen MLP and its LoRA as one operation.

The first layer's output is the widest tensor of a transformer layer. As operations of their own, LoRA's product is
added to it, and to the gradient of the activation, in a pass over memory each. Here both are added where the activation
and its gradient read those tensors anyway, as is the bias.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from posttrain.ops.division import WHOLE, Division
from posttrain.ops.fp8_linear import Weight
from posttrain.ops.fused_lora import FusedLoRALinear, modules_of
from posttrain.ops.low_rank import LowRank, scaled_product, weight_gradient
from posttrain.ops.parallel_lora import Context, gathered_product, summed_product
from posttrain.ops.recomputed_norms import Activation, Function, Norm, backward_through

FUNCTIONS: dict[object, Function] = {F.silu: "silu", fast_gelu: "gelu_tanh", F.gelu: "gelu"}


@dataclass(frozen=True)
class FrozenMLP:
    """What is not trained of an MLP, h -> h, and how it is divided: the first layer's outputs, the second's inputs.

    Attributes:
        first, second: weights [f/n, h], with gates [2 f/n, h], gates first; and [h, f/n].
        scale, second_scale: alpha / rank of their adapters.
        activation: between them, with the first layer's bias.
        norm: of the input; None: there is none.
        division: over n processes.
    """

    first: Weight
    second: Weight
    scale: float
    second_scale: float
    activation: Activation
    norm: Norm | None = None
    division: Division = WHOLE


class MLPWithLoRA(torch.autograd.Function):
    """An MLP whose layers are y = x W^T + scale (x A^T) B^T.

    Norm and activation are computed again in the backward pass. Kept for that: the input, the first layer's frozen
    product, and the rank-r products.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        mlp: FrozenMLP,
        a: torch.Tensor,
        b: torch.Tensor,
        second_a: torch.Tensor,
        second_b: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the MLP of x [..., h], of own tokens where these are divided.

        The adapters are a [r, h], b [f/n, r] or [2 f/n, r], second_a [r, f/n], second_b [h, r].
        """
        flat = x.reshape(-1, x.size(-1))
        normed = mlp.norm(flat) if mlp.norm else flat
        both, low = gathered_product(mlp.division, mlp.first.product, normed, b.size(0), mlp.scale, a.t())
        activated = mlp.activation(both, LowRank(low, b.t()))
        second_low = scaled_product(mlp.second_scale, activated, second_a.t())
        added = LowRank(second_low, second_b.t())
        out, own_second_low = summed_product(mlp.division, mlp.second.product, activated, x.size(-1), added)
        ctx.save_for_backward(flat, both, low, own_second_low)
        ctx.adapters = a, b, second_a, second_b  # not saved tensors, see posttrain.ops.fused_lora
        ctx.mlp = mlp
        ctx.shape = x.shape
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Context, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and the adapters."""
        flat, both, low, own_second_low = ctx.saved_tensors
        a, b, second_a, second_b = ctx.adapters
        mlp: FrozenMLP = ctx.mlp
        upstream = upstream.reshape(flat.shape)
        grad_second_b = weight_gradient(second_b, upstream.t(), own_second_low)
        grad_activated, second_down = gathered_product(
            mlp.division, mlp.second.gradient_product(), upstream, second_a.size(1), mlp.second_scale, second_b
        )
        grad_both, activated = mlp.activation.backward(
            grad_activated, both, LowRank(low, b.t()), LowRank(second_down, second_a)
        )
        del grad_activated
        grad_second_a = weight_gradient(second_a, second_down.t(), activated)
        del activated
        down = scaled_product(mlp.scale, grad_both, b)
        grad_b = weight_gradient(b, grad_both.t(), low)
        grad_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            gradient = mlp.first.gradient_product()
            grad_x, own_down = summed_product(mlp.division, gradient, grad_both, flat.size(1), LowRank(down, a))
        else:
            own_down = mlp.division.sum(down)
        del grad_both
        grad_x, normed = backward_through(mlp.norm, grad_x, flat)
        grad_a = weight_gradient(a, own_down.t(), normed)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_a, grad_b, grad_second_a, grad_second_b


class FusedMLP(MLP):
    """Megatron's MLP, its activation part of the second layer's operation, or all of it one."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As MLP: (output, bias that the caller adds or None)."""
        first, last = self.linear_fc1, self.linear_fc2
        if per_token_scale is not None or not last.fusable():
            return super().forward(hidden_states, per_token_scale, **kwargs)
        function, gated = FUNCTIONS[self.activation_func], bool(self.config.gated_linear_unit)
        if type(first) is not FusedLoRALinear or not first.fusable():
            both, bias = first(hidden_states)
            return last.apply_fused(both, Activation(function, gated, bias))
        x, norm = first.norm_first(hidden_states)
        activation = Activation(function, gated, first.layer_bias)
        scales = first.lora_scale, last.lora_scale
        mlp = FrozenMLP(first.layer_weight, last.layer_weight, *scales, activation, norm, last.divided)
        return last.with_bias(MLPWithLoRA.apply(x, mlp, *first.matrices, *last.matrices))


def fuse_activations(model: list[torch.nn.Module], recompute: bool) -> None:
    """Make each plain MLP with a fused second layer a FusedMLP; without `recompute` none."""
    for module in modules_of(model):
        if isinstance(module, FusedLoRALinear):
            module.recompute = recompute
        if not recompute or type(module) is not MLP or type(module.linear_fc2) is not FusedLoRALinear:
            continue
        if module.activation_func in FUNCTIONS and is_plain(module.config) and not trains_bias(module.linear_fc1):
            module.__class__ = FusedMLP


def is_plain(config: TransformerConfig) -> bool:
    """Whether an MLP's activation is of its input as it is, and its gate multiplied so."""
    return (
        not config.use_te_activation_func
        and not config.glu_linear_offset
        and config.activation_func_clamp_value is None
    )


def trains_bias(layer: object) -> bool:
    """Whether a layer's bias is trained, wrapped or not."""
    bias = getattr(getattr(layer, "to_wrap", layer), "bias", None)
    return bias is not None and bool(bias.requires_grad)
