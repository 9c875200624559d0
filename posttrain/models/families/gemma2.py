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
from posttrain.models.families.field_rules import (
    ACTIVATION,
    COUNT,
    LAYER_TYPES,
    NO_EFFECT,
    POSITIVE,
    SWITCH,
    decoder_rules,
    only,
)

FAMILY = ModelFamily(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    # Upstream's attention refuses packed sequences, and its LoRA on output matrices is added after a norm.
    bridge="posttrain.models.bridges.gemma2_bridge",
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp()),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    rules=decoder_rules(
        attention_bias=SWITCH,
        hidden_activation=ACTIVATION,
        query_pre_attn_scalar=POSITIVE,
        sliding_window=COUNT,
        layer_types=LAYER_TYPES,
        attn_logit_softcapping=POSITIVE,
        final_logit_softcapping=POSITIVE,
        use_bidirectional_attention=only(False),
        # transformers 4's name of a kind of cache, and its former way to say which activation
        cache_implementation=NO_EFFECT,
        sliding_window_size=NO_EFFECT,
        hidden_act=NO_EFFECT,
    ),
    fields=ConfigFields(
        activation=("hidden_activation",),
        softcap=("final_logit_softcapping",),
        score_softcap=("attn_logit_softcapping",),
        score_dropout=("attention_dropout",),
    ),
    tied=True,
    gate="gelu_pytorch_tanh",
    norms=4,
)
