"""Mistral: Llama's layer, in some versions with a sliding window."""

from posttrain.models.families.family import EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp

FAMILY = ModelFamily(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    matrices=(EMBEDDING, OUTPUT, *attention(), *gated_mlp()),
)
