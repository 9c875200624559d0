"""Mixtral: Mistral's attention, and a mixture of gated experts in every layer."""

from collections.abc import Mapping

from posttrain.models.families.family import EMBEDDING, OUTPUT, ConfigFields, Matrix, ModelFamily, attention
from posttrain.models.families.field_rules import (
    COUNT,
    SWITCH,
    Rule,
    at_least,
    decoder_rules,
    only,
    rope_kind,
    rope_parameters_of,
)

# The weight of a single chosen expert is always 1 here, which Megatron's router can't express.
TWO_OR_MORE = Rule("a whole number from 2 on", lambda value: type(value) is int and value > 1)


def scaled_rope_needs_a_head(config: Mapping[str, object]) -> str | None:
    """transformers computes these embeddings from head_dim alone, which Mixtral's files leave out."""
    kind = rope_kind(rope_parameters_of(config))
    if kind in ("dynamic", "yarn", "longrope") and config.get("head_dim") is None:
        return f"head_dim: is missing, and transformers cannot compute the rotary embedding {kind!r} without"
    return None


FAMILY = ModelFamily(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    bridge="posttrain.models.bridges.mixtral_bridge",  # there is none upstream
    matrices=(
        EMBEDDING,
        OUTPUT,
        *attention(),
        Matrix("block_sparse_moe.gate", ("experts", "hidden")),
        Matrix("experts.*.w1", ("inner", "hidden"), "linear_fc1_gate"),
        Matrix("experts.*.w3", ("inner", "hidden"), "linear_fc1_up"),
        Matrix("experts.*.w2", ("hidden", "inner"), "linear_fc2"),
    ),
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    rules=decoder_rules(
        sliding_window=COUNT,
        num_local_experts=COUNT,
        num_experts_per_tok=TWO_OR_MORE,
        output_router_logits=SWITCH,
        router_aux_loss_coef=at_least(0),
        router_jitter_noise=only(0.0, 0),
    ),
    constraints=(scaled_rope_needs_a_head,),
    fields=ConfigFields(experts=("num_local_experts",), chosen=("num_experts_per_tok",)),
)
