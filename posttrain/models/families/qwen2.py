"""Qwen2 and Qwen2.5: Llama's layer, with a bias on query, key and value."""

from posttrain.models.families.family import EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp

FAMILY = ModelFamily(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    matrices=(EMBEDDING, OUTPUT, *attention(qkv_bias=True), *gated_mlp()),
)
