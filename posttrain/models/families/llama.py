"""Llama 1 to 3.3, and the many models built like them."""

from posttrain.models.families.family import ATTENTION_BIAS, EMBEDDING, OUTPUT, Flag, ModelFamily, attention, gated_mlp
from posttrain.models.families.field_rules import NO_EFFECT, SWITCH, decoder_rules, only

FAMILY = ModelFamily(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    bridge="posttrain.models.bridges.llama_bridge",  # upstream's leaves out fields of config.json
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp(Flag("mlp_bias"))),
    rules=decoder_rules(
        attention_bias=SWITCH,
        mlp_bias=SWITCH,
        rope_interleaved=only(False),
        is_llama_config=NO_EFFECT,
        max_sequence_length=NO_EFFECT,
    ),
    fused_gate=True,
)
