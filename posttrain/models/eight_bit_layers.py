"""Layers whose frozen matrices are in 8 bits from the beginning: no process ever holds the 16-bit model."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from posttrain.models.local_spec import Specification
from posttrain.ops.fp8_linear import EightBitWeight

LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def eight_bit_layer_spec(
    of_model: Specification | Callable[..., Specification],
    config: GPTModelProvider,
    vp_stage: int | None = None,
    fully_sharded: bool = False,
) -> Specification:
    """A model's layers, their linear layers in 8 bits; a mixture's experts stay as they are.

    Args:
        of_model: the model's own, or the function that builds them; it may take `vp_stage`.
        config: of the model.
        vp_stage: stage of a virtual pipeline.
        fully_sharded: whether Megatron-FSDP will divide the model.
    """
    if isinstance(of_model, ModuleSpec | TransformerBlockSubmodules):
        spec = of_model
    else:
        options = {}
        if "vp_stage" in inspect.signature(of_model).parameters:
            options["vp_stage"] = vp_stage
        spec = of_model(config, **options)
    layers = [spec]
    if isinstance(spec, TransformerBlockSubmodules):
        layers = spec.layer_specs
    for layer in layers:
        for part in (layer.submodules.self_attention, layer.submodules.mlp):
            keep_linear_in_eight_bits(submodules_of(part), fully_sharded)
    return spec


def submodules_of(part: ModuleSpec | partial[Any]) -> Any:
    """What a part of a layer is built of, in either of core's ways to say so."""
    if isinstance(part, partial):
        return part.keywords["submodules"]
    return part.submodules


def keep_linear_in_eight_bits(submodules: Any, fully_sharded: bool) -> None:
    """Have the linear layers among these built so."""
    for name in LINEAR:
        build = getattr(submodules, name, None)
        if build is not None and not isinstance(build, partial):
            setattr(submodules, name, partial(in_eight_bits, build, fully_sharded))


def in_eight_bits(build: Callable[..., Any], fully_sharded: bool, *args: Any, **kwargs: Any) -> Any:
    """A linear layer whose matrix is in 8 bits, filled later."""
    linear = build(*args, **kwargs)
    former = linear.weight
    if fully_sharded:
        linear.weight = EightBitWeight.to_be_divided(former)
        return linear
    numbers = torch.zeros(former.shape, dtype=torch.uint8, device=former.device)
    scale = torch.ones(former.size(0), device=former.device)
    linear.weight = EightBitWeight.in_place_of(former, numbers, scale)
    return linear
