"""What Megatron's local layers (those without Transformer Engine) lack for packed fine-tuning."""

from posttrain.patches import Platform, patch


def without_te(platform: Platform) -> bool:
    """The condition of every patch here."""
    return not platform.transformer_engine


@patch(
    "local-packed-rope",
    symptom="the unfused rotary embedding of packed sequences loops over them with one copy each",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=without_te,
)
def packed_rope() -> None:
    """Gather each token's angles by its position in its own sequence instead."""
    import megatron.core.models.common.embeddings.rope_utils as rope
    import torch

    plain = rope._apply_rotary_pos_emb_thd

    def apply(t, cu_seqlens, freqs, rotary_interleaved=False, mla_rotary_interleaved=False, mscale=1.0, cp_group=None,
              **kwargs):  # fmt: skip
        if cp_group is not None and cp_group.size() > 1:
            return plain(t, cu_seqlens, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, cp_group, **kwargs)
        token = torch.arange(t.size(0), device=t.device)
        # Tokens after the last sequence are padding; clamping gives them some angle, their output is masked.
        sequence = torch.bucketize(token, cu_seqlens[1:-1], right=True)
        position = (token - cu_seqlens[sequence]).clamp(max=freqs.size(0) - 1)
        rotated = rope._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1), freqs[position], rotary_interleaved=rotary_interleaved,
            mla_rotary_interleaved=mla_rotary_interleaved, mscale=mscale,
        )  # fmt: skip
        return rotated.squeeze(1)

    rope._apply_rotary_pos_emb_thd = apply


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
