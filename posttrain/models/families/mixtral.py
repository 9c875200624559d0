"""Mixtral: Mistral's attention, and a mixture of gated experts in every layer."""

from posttrain.models.families.family import EMBEDDING, OUTPUT, ConfigFields, Matrix, ModelFamily, attention

FAMILY = ModelFamily(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    bridge="posttrain.models.bridges.mixtral_bridge",  # there is none upstream
    matrices=(
        EMBEDDING,
        OUTPUT,
        *attention(),
        Matrix("block_sparse_moe.gate", ("experts", "hidden")),
        Matrix("experts.*.w1", ("inner", "hidden"), "linear_fc1_gate"),
        Matrix("experts.*.w3", ("inner", "hidden"), "linear_fc1_up"),
        Matrix("experts.*.w2", ("hidden", "inner"), "linear_fc2"),
    ),
    fields=ConfigFields(experts=("num_local_experts",), chosen=("num_experts_per_tok",)),
    no_cuda_graph="dropless experts ask the device how many tokens each of them gets",
)
