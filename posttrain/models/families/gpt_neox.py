"""GPT-NeoX and Pythia: partial rotary embedding, and attention and MLP that read the same input (parallel residual)."""

from typing import TYPE_CHECKING, Any

from posttrain.models.families.family import ConfigFields, Flag, Matrix, ModelFamily
from posttrain.models.families.field_rules import (
    ACTIVATION,
    COMMON,
    COUNT,
    FRACTION,
    NO_EFFECT,
    POSITIVE,
    ROPE_KINDS,
    SHARE,
    SWITCH,
    above,
    only,
    rope_rule,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Those that also scale attention do so in the rotated part of a head alone, which Megatron's attention can't.
ROPE = rope_rule(*(name for name, kind in ROPE_KINDS.items() if not kind.scales_attention), share=SHARE)
ATTENTION_BIAS = Flag("attention_bias", default=True)


def legacy_fields(config: "PretrainedConfig") -> dict[str, Any]:
    """The rotary embedding in the words of transformers 4."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        return {}
    return {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}


FAMILY = ModelFamily(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    bridge="posttrain.models.bridges.gpt_neox_bridge",  # there is none upstream
    matrices=(
        Matrix("embed_in", ("vocabulary", "hidden")),
        Matrix("embed_out", ("vocabulary", "hidden")),
        Matrix("attention.query_key_value", ("qkv", "hidden"), "linear_qkv", ATTENTION_BIAS),
        Matrix("attention.dense", ("hidden", "query"), "linear_proj", ATTENTION_BIAS),
        Matrix("mlp.dense_h_to_4h", ("inner", "hidden"), "linear_fc1", bias=True),
        Matrix("mlp.dense_4h_to_h", ("hidden", "inner"), "linear_fc2", bias=True),
    ),
    rules={
        **COMMON,
        "hidden_size": COUNT,
        "intermediate_size": COUNT,
        "num_hidden_layers": COUNT,
        "num_attention_heads": COUNT,
        "hidden_act": ACTIVATION,
        "max_position_embeddings": COUNT,
        "layer_norm_eps": POSITIVE,
        "attention_dropout": FRACTION,
        "hidden_dropout": FRACTION,
        "classifier_dropout": NO_EFFECT,
        "attention_probs_dropout_prob": only(0, 0.0),
        "hidden_dropout_prob": only(0, 0.0),
        "use_parallel_residual": SWITCH,
        "attention_bias": only(True),
        "rotary_pct": SHARE,
        "partial_rotary_factor": SHARE,
        "rotary_emb_base": above(1),
        "rope_theta": above(1),
        "rope_scaling": ROPE,
        "rope_parameters": ROPE,
    },
    fields=ConfigFields(groups=(), head=(), dropout=("hidden_dropout",)),
    embedding="embed_in.weight",
    output_layer="embed_out.weight",
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    gate=None,
    norm_bias=True,
    parallel_residual=Flag("use_parallel_residual", default=True),
    legacy_fields=legacy_fields,
)
