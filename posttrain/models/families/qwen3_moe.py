"""Qwen3, mixture of experts: Qwen3's attention, and gated experts with a width of their own."""

from collections.abc import Mapping
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
from posttrain.models.families.field_rules import COUNT, NO_EFFECT, SWITCH, at_least, decoder_rules, only

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def legacy_fields(config: "PretrainedConfig") -> dict[str, Any]:
    """transformers 4 knows the former name, 5 writes the latter."""
    return {"num_experts": config.num_experts, "num_local_experts": config.num_experts}


def one_expert_is_weighed(config: Mapping[str, object]) -> str | None:
    """A single expert's weight, made to sum to one, is always 1, which Megatron's router can't express."""
    if config.get("num_experts_per_tok") == 1 and config.get("norm_topk_prob"):
        return "num_experts_per_tok=1: is not supported with norm_topk_prob=true"
    return None


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
    defaults={"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    rules=decoder_rules(
        attention_bias=SWITCH,
        use_sliding_window=SWITCH,
        sliding_window=COUNT,
        max_window_layers=NO_EFFECT,  # every layer has the window
        decoder_sparse_step=only(1),
        mlp_only_layers=only([]),
        moe_intermediate_size=COUNT,
        num_experts=COUNT,
        num_local_experts=COUNT,
        num_experts_per_tok=COUNT,
        norm_topk_prob=SWITCH,
        output_router_logits=SWITCH,
        router_aux_loss_coef=at_least(0),
    ),
    constraints=(one_expert_is_weighed,),
    fields=ConfigFields(
        expert_inner=("moe_intermediate_size",),
        experts=("num_local_experts", "num_experts"),
        chosen=("num_experts_per_tok",),
    ),
    qk_norm=True,
    legacy_fields=legacy_fields,
)
