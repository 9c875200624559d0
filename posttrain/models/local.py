"""Settings of a Megatron model provider for layers without Transformer Engine."""

from typing import Any


def local_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Return Megatron-Core's local layer specification for `config` (a GPTModelProvider)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )


def use_local_layers(provider: Any) -> None:
    """Switch `provider` to local layers and off every fusion that needs Transformer Engine, Apex or CUDA."""
    from megatron.bridge.models.gpt_provider import default_layer_spec

    provider.transformer_impl = "local"
    # A family with layers of its own (its bridge set the specification) chooses them by transformer_impl itself.
    if provider.transformer_layer_spec is default_layer_spec:
        provider.transformer_layer_spec = local_layer_spec
    provider.moe_grouped_gemm = False
    provider.gradient_accumulation_fusion = False
    provider.persist_layer_norm = False
    provider.masked_softmax_fusion = False
    provider.bias_dropout_fusion = False
    provider.bias_activation_fusion = False
    provider.apply_rope_fusion = False
    provider.cross_entropy_loss_fusion = False
