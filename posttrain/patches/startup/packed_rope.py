"""Rotary embedding of packed sequences."""

from posttrain.patches.registry import Kind, patch


@patch(
    "packed-rope",
    kind=Kind.STARTUP,
    symptom="Transformer Engine's packed rotary kernel has a block for every position of every sequence as long as the "
    "longest, most of them empty: with boundaries filled up for a CUDA graph it took 16 % of a 1B model's step. The "
    "unfused one copies sequence by sequence",
    versions={"megatron-core": ">=0.19,<0.20"},
)
def packed_rope() -> None:
    """Look up each token's angles by its position once per batch, then rotate all tokens as one sequence."""
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.transformer.attention as attention
    import torch

    plain = rope.apply_rotary_pos_emb

    def angles(freqs: torch.Tensor, ends: torch.Tensor, total: int) -> torch.Tensor:
        """freqs [longest, 1, 1, d] -> [total, 1, 1, d]; kept with the boundaries, which are one batch's."""
        kept = getattr(ends, "posttrain_angles", None)
        if kept is None or kept[0] is not freqs:
            token = torch.arange(total, device=freqs.device, dtype=ends.dtype)
            sequence = torch.searchsorted(ends, token, right=True) - 1
            # Tokens after the last sequence are padding: clamping gives them some angle, their output is masked.
            position = (token - ends[sequence]).clamp(max=freqs.size(0) - 1)
            kept = (freqs, freqs.index_select(0, position))
            ends.posttrain_angles = kept
        return kept[1]

    def apply(t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None, mla_rotary_interleaved=False):
        if cu_seqlens is None or (cp_group is not None and cp_group.size() > 1):
            return plain(t, freqs, config, cu_seqlens, mscale, cp_group, mla_rotary_interleaved)
        rows = angles(freqs, cu_seqlens, t.size(0))
        return plain(t.unsqueeze(1), rows, config, None, mscale, cp_group, mla_rotary_interleaved).squeeze(1)

    rope.apply_rotary_pos_emb = attention.apply_rotary_pos_emb = apply
