"""Gemma 2: a norm before and after attention and MLP, soft-capped logits, a window on every other layer."""

from posttrain.models.families.family import (
    ATTENTION_BIAS,
    EMBEDDING,
    OUTPUT,
    ConfigFields,
    ModelFamily,
    attention,
    gated_mlp,
)

FAMILY = ModelFamily(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    # Upstream's attention refuses packed sequences, and its LoRA on output matrices is added after a norm.
    bridge="posttrain.models.bridges.gemma2_bridge",
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp()),
    fields=ConfigFields(softcap=("final_logit_softcapping",), score_softcap=("attn_logit_softcapping",)),
    tied=True,
    always_tied=True,
    gate="gelu",
    norms=4,
)
