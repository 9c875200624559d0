"""Gemma: Llama's layer with GELU, a gain of the norms that is stored as its difference from one, tied embeddings."""

from posttrain.models.families.family import ATTENTION_BIAS, EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp

FAMILY = ModelFamily(
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    bridge="posttrain.models.bridges.gemma_bridge",  # upstream's insists on the flash-attn package
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp()),
    tied=True,
    always_tied=True,
    gate="gelu",
)
