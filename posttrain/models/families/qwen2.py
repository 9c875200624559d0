"""Qwen2 and Qwen2.5: Llama's layer, with a bias on query, key and value."""

from posttrain.models.families.family import EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp
from posttrain.models.families.field_rules import (
    COUNT,
    LAYER_TYPES,
    LAYERS,
    NO_EFFECT,
    SWITCH,
    decoder_rules,
    only,
    windows_are_switched_on,
)

FAMILY = ModelFamily(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    bridge="posttrain.models.bridges.qwen2_bridge",  # upstream's leaves out fields of config.json
    matrices=(EMBEDDING, OUTPUT, *attention(qkv_bias=True), *gated_mlp()),
    defaults={"num_key_value_heads": 32},
    rules=decoder_rules(
        use_sliding_window=SWITCH,
        sliding_window=COUNT,
        max_window_layers=LAYERS,
        layer_types=LAYER_TYPES,
        use_mrope=only(False),
        dual_chunk_attention_config=NO_EFFECT,  # of one server, beyond the trained length
    ),
    constraints=(windows_are_switched_on,),
)
