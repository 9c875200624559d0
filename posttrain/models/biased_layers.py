"""Biases in attention or MLP alone, where Megatron's configuration has one switch for both."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from posttrain.models.local_spec import Specification, layer_spec


class BiasedSelfAttention(SelfAttention):
    """Self-attention whose four projections have biases."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(biased(config), *args, **kwargs)


def biased(config: TransformerConfig) -> TransformerConfig:
    """A copy that asks for biases in linear layers."""
    changed = copy.copy(config)
    changed.add_bias_linear = True
    return changed


def biased_mlp(config: TransformerConfig, **kwargs: Any) -> MLP:
    """An MLP both of whose layers have biases."""
    return MLP.as_mlp_submodule(config=biased(config), **kwargs)


def with_biases(
    of_family: Callable[..., Specification],
    config: GPTModelProvider,
    vp_stage: int | None = None,
    *,
    attention: bool,
    mlp: bool,
) -> Specification:
    """The layers of a family, with biases.

    Args:
        of_family: its own specification, or upstream's default.
        config: the model's configuration.
        vp_stage: stage of a virtual pipeline.
        attention: in query, key, value and output projections.
        mlp: in both layers of the MLP.
    """
    chosen = layer_spec if of_family is default_layer_spec else of_family
    spec = chosen(config, vp_stage=vp_stage)
    layers = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        parts = layer.submodules
        if attention:
            ours = parts.self_attention
            parts.self_attention = ModuleSpec(BiasedSelfAttention, params=ours.params, submodules=ours.submodules)
        if mlp:
            parts.mlp = partial(biased_mlp, submodules=parts.mlp.keywords["submodules"])
    return spec
