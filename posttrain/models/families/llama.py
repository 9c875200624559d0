"""Llama 1 to 3.3, and the many models built like them."""

from posttrain.models.families.family import ATTENTION_BIAS, EMBEDDING, OUTPUT, Flag, ModelFamily, attention, gated_mlp

FAMILY = ModelFamily(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp(Flag("mlp_bias"))),
    fused_gate=True,
)
