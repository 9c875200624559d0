"""GPT-2: learned positions, tied embeddings, linear weights stored transposed (Conv1D), biases everywhere."""

from posttrain.models.families.family import ConfigFields, Matrix, ModelFamily

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
    ),
    layer_list="h",
    embedding="wte.weight",
    tied=True,
    always_tied=True,
    transposed=True,
    buffers=("attn.bias", "attn.masked_bias"),
    gate=None,
    norm_bias=True,
    dropout=0.1,
    no_cuda_graph="its captured step has not been compared with the plain one",
)
