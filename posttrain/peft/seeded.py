"""Adapters whose start does not depend on how the model is divided over processes.

Megatron-Bridge draws each process's part of A from that process's generator and scales it by the part's width, so
another tensor- or pipeline-parallel size is another run. Here each A is drawn whole, from a generator seeded by the run
and the parameter's name, and each process keeps its part: kaiming-uniform with a = sqrt(5) over the full input width,
as Hugging Face's PEFT does.
"""

import hashlib
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from posttrain.ops.fused_lora import fuse, fuse_activations
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
                    _draw_part(parameter, divided_by(name), f"{seed}/{layer.layer_number}/{whole}")


@torch.no_grad()
def _draw_part(parameter: torch.nn.Parameter, place: tuple[int, int], seed: str) -> None:
    """Fill an A, [rank, in], either divided over the processes or not at all.

    Args:
        parameter: of this process.
        place: processes that it may be divided over, and the place of this one among them.
        seed: what its values depend on.
    """
    processes, rank = place
    split = -1
    if getattr(parameter, "tensor_model_parallel", False):
        split = getattr(parameter, "partition_dim", -1)
    shape = list(parameter.shape)
    if split >= 0:
        shape[split] *= processes
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest(), "big")
    generator = torch.Generator("cpu").manual_seed(number)
    bound = 1.0 / math.sqrt(shape[-1])
    whole = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
    if split >= 0:
        whole = whole.chunk(processes, dim=split)[rank]
    parameter.copy_(whole)


def divided_by(name: str) -> tuple[int, int]:
    """Processes that the parameter `name` may be divided over, and the place of this one among them."""
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


def whole_name(name: str, experts: int | None) -> str:
    """The parameter's name with an expert's number in the whole model; each process counts its own from 0.

    Grouped experts share one adapter, on all processes the same, and have no number.
    """
    here = (experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first = here * parallel_state.get_expert_model_parallel_rank()
    return re.sub(r"(?<=local_experts\.)\d+", lambda match: str(first + int(match[0])), name)


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
            if self.start:
                self.start(parts)
        return adapted


class SeededLoRA(Seeded, LoRA):
    """One adapter per matrix of Megatron's, fused with it; `fused` and `recompute_norms` are set by the trainer."""

    fused = True
    recompute_norms = True

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Attach the adapters; with them, fuse the MLPs' activations."""
        adapted = super().__call__(model, training=training)
        if self.fused:
            fuse_activations(parts_of(adapted), self.recompute_norms)
        return adapted

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """Attach an adapter to one module where it is a target."""
        adapted = super().transform(module, name, prefix)
        return fuse(adapted) if self.fused else adapted


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
