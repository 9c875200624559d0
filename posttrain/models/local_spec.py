"""Which layers a model is built of: Transformer Engine's, or Megatron's local ones, and what the local ones lack.

Core's own local attention holds every score and refuses packed sequences, and its norms refuse sequence parallelism:
both are replaced in the specification of the layers, of every family.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.models import gpt_provider
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.utils.import_utils import UnavailableError, UnavailableMeta
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer import transformer_block
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from posttrain.errors import UserError
from posttrain.models.config_checks import check_wide_heads, is_wide
from posttrain.models.norms import SequenceParallelNorm, zero_centered_norm
from posttrain.ops.attention import SDPAAttention
from posttrain.ops.packed_attention import PackedAttention

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge

# Core's local module -> the one that stands for it.
REPLACED = {DotProductAttention: SDPAAttention, WrappedTorchNorm: SequenceParallelNorm}

NEEDS_GPU = (
    "this model's layers are there as Transformer Engine's alone: it needs a GPU with Transformer Engine, and can't be "
    "trained or converted on a CPU"
)

type Specification = ModuleSpec | TransformerBlockSubmodules


def uses_te(config: GPTModelProvider) -> bool:
    """Whether the model is built of Transformer Engine's layers."""
    return config.transformer_impl == "transformer_engine"


def layer_spec(config: GPTModelProvider, vp_stage: int | None = None) -> Specification:
    """The usual layers of the platform: a layer's specification, or a whole block's (see `block`).

    Args:
        config: `transformer_impl` chooses between "transformer_engine" and "local".
        vp_stage: stage of a virtual pipeline.
    """
    if uses_te(config):
        return default_layer_spec(config)
    return block(config, local_layer(config), vp_stage)


def local_layer(config: GPTModelProvider) -> ModuleSpec:
    """One layer without Transformer Engine; with norms that know zero-centred gains where the model has them."""
    spec = complete(gpt_provider.local_layer_spec(config))
    if config.layernorm_zero_centered_gamma:
        spec.submodules.input_layernorm = zero_centered_norm(config)
        spec.submodules.pre_mlp_layernorm = zero_centered_norm(config)
    return spec


def block(config: GPTModelProvider, layer: ModuleSpec, vp_stage: int | None = None) -> Specification:
    """All layers of this pipeline stage, with a final norm like theirs; core chooses it with Transformer Engine."""
    if uses_te(config):
        return layer
    norm = complete(transformer_block.LayerNormImpl)
    if config.layernorm_zero_centered_gamma:
        norm = zero_centered_norm(config)
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), norm)


def complete(part: Any) -> Any:
    """A part of a specification, of whatever type, with what local layers lack; a dataclass is changed in place."""
    if isinstance(part, UnavailableMeta):
        raise UserError(NEEDS_GPU)
    if isinstance(part, type):
        return REPLACED.get(part, part)
    if isinstance(part, list):
        return list(map(complete, part))
    if dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            setattr(part, field.name, complete(getattr(part, field.name)))
    return part


def family_layer_spec(
    of_family: Callable[..., Specification], config: GPTModelProvider, vp_stage: int | None = None
) -> Specification:
    """The local layers that a family's own specification builds, with what they lack.

    Args:
        of_family: the family's function; it may take `vp_stage`.
        config: the model's configuration.
        vp_stage: stage of a virtual pipeline.

    Raises:
        UserError: it has layers of Transformer Engine alone.
    """
    options = {}
    if "vp_stage" in inspect.signature(of_family).parameters:
        options["vp_stage"] = vp_stage
    try:
        spec = of_family(config, **options)
    except (TypeError, AssertionError, UnavailableError) as error:  # what upstream's meet where it is absent
        raise UserError(NEEDS_GPU) from error
    spec = complete(spec)
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    return block(config, spec, vp_stage)


def check_expert_names(bridge: "AutoBridge", provider: GPTModelProvider) -> None:
    """Raise a UserError where the bridge of a mixture names grouped experts alone; local ones are modules each."""
    if not provider.num_moe_experts:
        return
    names = (mapping.megatron_param for mapping in bridge._model_bridge.mapping_registry().get_all_mappings())
    if not any(".local_experts." in name for name in names):
        raise UserError(NEEDS_GPU)


def use_local_layers(provider: GPTModelProvider) -> None:
    """Switch `provider` to local layers and off every fusion that needs Transformer Engine, Apex or CUDA.

    Raises:
        UserError: the model has no local layers that compute what it computes.
    """
    without = not hasattr(provider, "transformer_layer_spec")  # no GPT: layers of several kinds
    if without or provider.softmax_type != "vanilla":  # attention sinks
        raise UserError(NEEDS_GPU)
    provider.transformer_impl = "local"
    # A family with layers of its own (its bridge set the specification) chooses them by transformer_impl itself.
    chosen = provider.transformer_layer_spec
    if chosen is default_layer_spec:
        provider.transformer_layer_spec = layer_spec
    elif callable(chosen):
        provider.transformer_layer_spec = partial(family_layer_spec, chosen)
    else:
        provider.transformer_layer_spec = complete(chosen)
    provider.moe_grouped_gemm = False
    provider.moe_permute_fusion = False
    provider.gradient_accumulation_fusion = False
    provider.persist_layer_norm = False
    provider.masked_softmax_fusion = False
    provider.bias_dropout_fusion = False
    provider.bias_activation_fusion = False
    provider.apply_rope_fusion = False
    provider.cross_entropy_loss_fusion = False


def choose_attention(model: list[torch.nn.Module]) -> None:
    """Make every attention of Transformer Engine's in a model's parts a PackedAttention.

    Raises:
        UserError: wide heads with what only Transformer Engine's attention has.
    """
    for part in model:
        for module in part.modules():
            if type(module) is not TEDotProductAttention:
                continue
            config: TransformerConfig = module.config
            check_wide_heads(config.kv_channels, config.context_parallel_size, config.attention_dropout)
            module.__class__ = PackedAttention
            module.flash = is_wide(config.kv_channels)  # type: ignore[assignment]
