"""GPT-2: learned positions, tied embeddings, linear weights stored transposed (Conv1D), biases everywhere."""

from posttrain.models.families.family import ConfigFields, Matrix, ModelFamily
from posttrain.models.families.field_rules import ACTIVATION, COMMON, COUNT, FRACTION, NO_EFFECT, POSITIVE, equal, only

FAMILY = ModelFamily(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    bridge="posttrain.models.bridges.gpt2_bridge",  # there is none upstream
    matrices=(
        Matrix("wte", ("vocabulary", "hidden")),
        Matrix("wpe", ("positions", "hidden")),
        Matrix("lm_head", ("vocabulary", "hidden")),
        Matrix("attn.c_attn", ("hidden", "qkv"), "linear_qkv", bias=True),
        Matrix("attn.c_proj", ("query", "hidden"), "linear_proj", bias=True),
        Matrix("mlp.c_fc", ("hidden", "inner"), "linear_fc1", bias=True),
        Matrix("mlp.c_proj", ("inner", "hidden"), "linear_fc2", bias=True),
    ),
    defaults={"n_positions": 1024},
    rules={
        **COMMON,
        "n_embd": COUNT,
        "n_inner": COUNT,
        "n_layer": COUNT,
        "n_head": COUNT,
        "n_positions": COUNT,
        "n_ctx": NO_EFFECT,
        "activation_function": ACTIVATION,
        "resid_pdrop": FRACTION,
        "embd_pdrop": FRACTION,
        "attn_pdrop": FRACTION,
        "layer_norm_epsilon": POSITIVE,
        "scale_attn_weights": only(True),
        "scale_attn_by_inverse_layer_idx": only(False),
        "reorder_and_upcast_attn": NO_EFFECT,  # the same in more precise arithmetic
        "summary_type": NO_EFFECT,
        "summary_use_proj": NO_EFFECT,
        "summary_activation": NO_EFFECT,
        "summary_proj_to_labels": NO_EFFECT,
        "summary_first_dropout": NO_EFFECT,
    },
    constraints=(equal("embd_pdrop", "resid_pdrop", 0.1, "Megatron has one dropout for both"),),
    fields=ConfigFields(
        hidden=("n_embd",),
        inner=("n_inner",),
        layers=("n_layer",),
        heads=("n_head",),
        groups=(),
        head=(),
        positions=("n_positions",),
        learned_positions=("n_positions",),
        dropout=("resid_pdrop",),
        activation=("activation_function",),
    ),
    layer_list="h",
    embedding="wte.weight",
    tied=True,
    transposed=True,
    buffers=("attn.bias", "attn.masked_bias"),
    gate=None,
    norm_bias=True,
    dropout=0.1,
)
