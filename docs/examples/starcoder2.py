"""StarCoder2: LayerNorm, biases everywhere, an MLP without gate, grouped queries, a sliding window."""

from posttrain.models import HFModel
from posttrain.models.families import register
from posttrain.models.families.family import EMBEDDING, OUTPUT, ConfigFields, Flag, Matrix, ModelFamily, attention
from posttrain.models.families.field_rules import COUNT, FRACTION, POSITIVE, SWITCH, decoder_rules, equal

BIAS = Flag("use_bias", default=True)

FAMILY = register(
    ModelFamily(
        model_type="starcoder2",
        architectures=("Starcoder2ForCausalLM",),
        bridge="starcoder2_bridge",  # imported when a model is built, not before: it needs Megatron
        matrices=(
            EMBEDDING,
            OUTPUT,
            *attention(BIAS, BIAS),
            Matrix("mlp.c_fc", ("inner", "hidden"), "linear_fc1", BIAS),
            Matrix("mlp.c_proj", ("hidden", "inner"), "linear_fc2", BIAS),
        ),
        # What each field of a config.json may say; any other is refused.
        rules=decoder_rules(
            norm_epsilon=POSITIVE,
            use_bias=SWITCH,
            sliding_window=COUNT,
            residual_dropout=FRACTION,
            embedding_dropout=FRACTION,
        ),
        constraints=(equal("embedding_dropout", "residual_dropout", 0.0, "Megatron has one dropout for both"),),
        fields=ConfigFields(dropout=("residual_dropout",)),
        tied=True,
        gate=None,
        norm_bias=True,
        no_cuda_graph="its captured step has not been compared with the plain one",
    )
)


class Starcoder2(HFModel):
    """What conf/model/starcoder2_3b.yaml names; whoever builds it imports this module, and the family is known."""
