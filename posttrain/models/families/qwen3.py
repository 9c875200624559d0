"""Qwen3, dense: Llama's layer, with normalised queries and keys."""

from posttrain.models.families.family import ATTENTION_BIAS, EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp
from posttrain.models.families.field_rules import (
    COUNT,
    LAYER_TYPES,
    LAYERS,
    SWITCH,
    decoder_rules,
    windows_are_switched_on,
)

FAMILY = ModelFamily(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    bridge="posttrain.models.bridges.qwen3_bridge",  # upstream's leaves out fields of config.json
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp()),
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    rules=decoder_rules(
        attention_bias=SWITCH,
        use_sliding_window=SWITCH,
        sliding_window=COUNT,
        max_window_layers=LAYERS,
        layer_types=LAYER_TYPES,
    ),
    constraints=(windows_are_switched_on,),
    qk_norm=True,
)
