"""Adapters whose start does not depend on how the model is divided over processes.

Megatron-Bridge draws each process's part of A from that process's generator and scales it by the part's width. Here
each A is drawn whole (posttrain.models.whole_parameters), on the CPU, so that a GPU's is the same: kaiming-uniform with
a = sqrt(5) over the full input width, as Hugging Face's PEFT does.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.utils import ParallelLinearAdapter
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from posttrain.models.whole_parameters import divided_by, draw_part, whole_name
from posttrain.ops.fused_lora import Gather, fuse, modules_of
from posttrain.ops.fused_mlp import fuse_activations
from posttrain.ops.query_key_value import fuse_attention
from posttrain.peft.canonical_layers import with_missing_parts
from posttrain.peft.dora_layers import with_whole_norm

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT as Adapter  # a mixin; at run time upstream's class comes after it
else:
    Adapter = object

type Model = torch.nn.Module | list[torch.nn.Module]


def parts_of(model: Model) -> list[torch.nn.Module]:
    """The chunks of this process."""
    return model if isinstance(model, list) else [model]


def draw(model: list[torch.nn.Module], seed: int) -> None:
    """Fill every adapter's A of `model` (chunks of this process) in place."""
    for chunk in model:
        for layer in chunk.modules():
            if not isinstance(layer, BaseTransformerLayer):
                continue
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and name.endswith("linear_in.weight"):
                    whole = whole_name(name, layer.config.num_moe_experts)
                    place = f"{seed}/{layer.layer_number}/{whole}"
                    draw_part(parameter, divided_by(name), place, uniform, device="cpu")


def count_shared_once(model: list[torch.nn.Module]) -> None:
    """Have Megatron's norm of the gradients count an adapter that a layer's experts share once.

    Every process of expert parallelism has the whole gradient of it, and the norm is of the parameters of all of them.
    """
    if parallel_state.get_expert_model_parallel_rank() == 0:
        return
    for module in modules_of(model):
        if isinstance(module, ParallelLinearAdapter) and module._uses_grouped_expert_sharding():
            for parameter in module.parameters():
                parameter.shared = True


def uniform(whole: torch.Tensor, /, *, generator: torch.Generator) -> torch.Tensor:
    """Fill a whole A, [rank, in]."""
    bound = 1.0 / math.sqrt(whole.shape[-1])
    return whole.uniform_(-bound, bound, generator=generator)


class Seeded(Adapter):
    """Adds the draw to one of Megatron-Bridge's adapter classes; the trainer sets `seed` and `start`.

    `start`: called with the adapted model's parts after the draw; loads an adapter to continue from.
    """

    seed = 0
    start: Callable[[list[torch.nn.Module]], None] | None = None

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Attach the adapters and draw their A."""
        adapted: Model = super().__call__(model, training=training)
        if training:
            parts = parts_of(adapted)
            draw(parts, self.seed)
            count_shared_once(parts)
            if self.start:
                self.start(parts)
        return adapted


class SeededLoRA(Seeded, LoRA):
    """One adapter per matrix of Megatron's, fused with it.

    Attributes:
        fused, recompute_norms: as in the config group `peft`.
        overlap: whether tensor parallelism's exchanges run beside products.
        gather_at_once: whether what tensor parallelism divides is gathered before a forward pass, for all layers.
    """

    fused = True
    recompute_norms = True
    overlap = True
    gather_at_once = True

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Attach the adapters; with them, fuse the MLPs' activations and the gathering."""
        adapted = super().__call__(model, training=training)
        if self.fused:
            fuse_activations(parts_of(adapted), self.recompute_norms)
            for module in modules_of(parts_of(adapted)):
                fuse_attention(module)
            if self.gather_at_once:
                Gather.attach(parts_of(adapted))
        return adapted

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """Attach an adapter to one module where it is a target."""
        adapted = super().transform(module, name, prefix)
        return fuse(adapted, self.overlap) if self.fused else adapted


class SeededCanonicalLoRA(Seeded, CanonicalLoRA):
    """One adapter per projection of Hugging Face's, or for some of them."""

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """Attach adapters to one module where it holds a target."""
        return with_missing_parts(super().transform(module, name, prefix))


class SeededDoRA(Seeded, DoRA):
    """DoRA per matrix of Megatron's."""

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """Attach an adapter with magnitudes to one module where it is a target."""
        return with_whole_norm(super().transform(module, name, prefix))
