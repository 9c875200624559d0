"""Qwen3, dense: Llama's layer, with normalised queries and keys."""

from posttrain.models.families.family import ATTENTION_BIAS, EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp

FAMILY = ModelFamily(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp()),
    qk_norm=True,
)
