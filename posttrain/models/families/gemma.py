"""Gemma: Llama's layer with GELU, a gain of the norms that is stored as its difference from one, tied embeddings."""

from collections.abc import Mapping

from posttrain.models.families.family import ATTENTION_BIAS, EMBEDDING, OUTPUT, ModelFamily, attention, gated_mlp
from posttrain.models.families.field_rules import ACTIVATION, SWITCH, decoder_rules, only


def one_activation(config: Mapping[str, object]) -> str | None:
    """transformers 4 reads hidden_activation, transformers 5 hidden_act."""
    old, new = config.get("hidden_activation"), config.get("hidden_act")
    if old is not None and new is not None and old != new:
        return f"hidden_act={new}: hidden_activation={old} says otherwise; programs differ in which they read"
    return None


FAMILY = ModelFamily(
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    bridge="posttrain.models.bridges.gemma_bridge",  # upstream's insists on the flash-attn package
    matrices=(EMBEDDING, OUTPUT, *attention(ATTENTION_BIAS, ATTENTION_BIAS), *gated_mlp()),
    defaults={"num_key_value_heads": 16, "head_dim": 256},
    rules=decoder_rules(
        attention_bias=SWITCH,
        hidden_activation=ACTIVATION,
        use_bidirectional_attention=only(False),
    ),
    constraints=(one_activation,),
    tied=True,
    gate="gelu_pytorch_tanh",
)
