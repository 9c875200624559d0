"""Which layers a model is built of: Transformer Engine's, or Megatron's local ones, and what the local ones lack."""

from megatron.bridge.models import gpt_provider
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from posttrain.models.norms import ZeroCenteredRMSNorm


def uses_te(config: GPTModelProvider) -> bool:
    """Whether the model is built of Transformer Engine's layers."""
    return config.transformer_impl == "transformer_engine"


def layer_spec(config: GPTModelProvider, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
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
    spec = gpt_provider.local_layer_spec(config)
    if config.layernorm_zero_centered_gamma:
        spec.submodules.input_layernorm = ZeroCenteredRMSNorm
        spec.submodules.pre_mlp_layernorm = ZeroCenteredRMSNorm
    return spec


def block(
    config: GPTModelProvider, layer: ModuleSpec, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """All layers of this pipeline stage; the final norm is core's choice, except for zero-centred local ones."""
    if uses_te(config) or not config.layernorm_zero_centered_gamma:
        return layer
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), ZeroCenteredRMSNorm)


def use_local_layers(provider: GPTModelProvider) -> None:
    """Switch `provider` to local layers and off every fusion that needs Transformer Engine, Apex or CUDA."""
    provider.transformer_impl = "local"
    # A family with layers of its own (its bridge set the specification) chooses them by transformer_impl itself.
    if provider.transformer_layer_spec is default_layer_spec:
        provider.transformer_layer_spec = layer_spec
    provider.moe_grouped_gemm = False
    provider.moe_permute_fusion = False
    provider.gradient_accumulation_fusion = False
    provider.persist_layer_norm = False
    provider.masked_softmax_fusion = False
    provider.bias_dropout_fusion = False
    provider.bias_activation_fusion = False
    provider.apply_rope_fusion = False
    provider.cross_entropy_loss_fusion = False
