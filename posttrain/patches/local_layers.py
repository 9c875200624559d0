"""What Megatron's local layers (those without Transformer Engine) lack for packed fine-tuning."""

from posttrain.patches import Platform, patch


def without_te(platform: Platform) -> bool:
    """The condition of every patch here."""
    return not platform.transformer_engine


@patch(
    "local-sdpa-attention",
    symptom="DotProductAttention of the local layers holds all scores and refuses packed sequences",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=without_te,
)
def sdpa_attention() -> None:
    """Use posttrain.attention.SDPAAttention wherever a local layer specification names DotProductAttention."""
    import megatron.core.models.backends as backends
    import megatron.core.models.gpt.gpt_layer_specs as specs

    from posttrain.attention import SDPAAttention

    backends.DotProductAttention = SDPAAttention
    if hasattr(specs, "DotProductAttention"):
        specs.DotProductAttention = SDPAAttention


@patch(
    "local-sequence-parallel-norm",
    symptom="core's wrapper of torch's norms asserts that sequence parallelism is off",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=without_te,
)
def sequence_parallel_norm() -> None:
    """Build the norm and mark its weights so that their gradients are summed over the tensor-parallel ranks."""
    import copy

    from megatron.core.transformer import torch_norm

    plain = torch_norm.WrappedTorchNorm.__new__

    def new(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return plain(cls, config, *args, **kwargs)
        quiet = copy.copy(config)
        quiet.sequence_parallel = False
        norm = plain(cls, quiet, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(new)
