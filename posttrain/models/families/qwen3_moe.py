"""Qwen3, mixture of experts: Qwen3's attention, and gated experts with a width of their own."""

from typing import TYPE_CHECKING, Any

from posttrain.models.families.family import (
    ATTENTION_BIAS,
    EMBEDDING,
    OUTPUT,
    ConfigFields,
    Matrix,
    ModelFamily,
    attention,
    gated_mlp,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def legacy_fields(config: "PretrainedConfig") -> dict[str, Any]:
    """transformers 4 knows the former name, 5 writes the latter."""
    return {"num_experts": config.num_experts, "num_local_experts": config.num_experts}


FAMILY = ModelFamily(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    bridge="posttrain.models.bridges.qwen3_moe_bridge",  # upstream's always adds a load-balancing loss
    matrices=(
        EMBEDDING,
        OUTPUT,
        *attention(ATTENTION_BIAS, ATTENTION_BIAS),
        *gated_mlp(),  # of layers without experts
        Matrix("mlp.gate", ("experts", "hidden")),
        Matrix("experts.*.gate_proj", ("expert_inner", "hidden"), "linear_fc1_gate"),
        Matrix("experts.*.up_proj", ("expert_inner", "hidden"), "linear_fc1_up"),
        Matrix("experts.*.down_proj", ("hidden", "expert_inner"), "linear_fc2"),
    ),
    fields=ConfigFields(
        expert_inner=("moe_intermediate_size",),
        experts=("num_local_experts", "num_experts"),
        chosen=("num_experts_per_tok",),
    ),
    qk_norm=True,
    no_cuda_graph="dropless experts ask the device how many tokens each of them gets",
    legacy_fields=legacy_fields,
)
