"""Mistral: Llama's layer, in some versions with a sliding window."""

from posttrain.models.families.family import EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp
from posttrain.models.families.field_rules import COUNT, decoder_rules

FAMILY = ModelFamily(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    bridge="posttrain.models.bridges.mistral_bridge",  # upstream's leaves out fields of config.json
    matrices=(EMBEDDING, OUTPUT, *attention(), *gated_mlp()),
    defaults={"num_key_value_heads": 8},
    rules=decoder_rules(sliding_window=COUNT),
)
