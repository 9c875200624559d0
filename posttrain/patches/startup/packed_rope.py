"""Rotary embedding of packed sequences."""

from typing import TYPE_CHECKING

from posttrain.patches.registry import Kind, patch, replace

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@patch(
    "packed-rope",
    kind=Kind.STARTUP,
    symptom="Transformer Engine's packed rotary kernel has a block for every position of every sequence as long as the "
    "longest, most of them empty: with boundaries filled up for a CUDA graph it took 16 % of a 1B model's step. The "
    "unfused one copies sequence by sequence",
    versions={"megatron-core": ">=0.19,<0.20"},
)
def rotate_packed_at_once() -> None:
    """Look up each token's angles by its position once per batch, then rotate all tokens as one sequence."""
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.transformer.attention as attention
    import torch

    plain = rope.apply_rotary_pos_emb

    def angles(freqs: torch.Tensor, ends: torch.Tensor, total: int) -> torch.Tensor:
        """freqs [longest, 1, 1, d] -> [total, 1, 1, d]; kept with the boundaries, which are one batch's."""
        saved: tuple[torch.Tensor, torch.Tensor] | None = getattr(ends, "posttrain_angles", None)
        if saved is None or saved[0] is not freqs:
            token = torch.arange(total, device=freqs.device, dtype=ends.dtype)
            sequence = torch.searchsorted(ends, token, right=True) - 1
            # Tokens after the last sequence are padding: clamping gives them some angle, their output is masked.
            position = (token - ends[sequence]).clamp(max=freqs.size(0) - 1)
            saved = (freqs, freqs.index_select(0, position))
            replace(ends, posttrain_angles=saved)
        return saved[1]

    def apply(
        t: torch.Tensor,
        freqs: torch.Tensor,
        config: "TransformerConfig",
        cu_seqlens: torch.Tensor | None = None,
        mscale: float = 1.0,
        cp_group: torch.distributed.ProcessGroup | None = None,
        mla_rotary_interleaved: bool = False,
    ) -> torch.Tensor:
        if cu_seqlens is None or (cp_group is not None and cp_group.size() > 1):
            return plain(t, freqs, config, cu_seqlens, mscale, cp_group, mla_rotary_interleaved)
        rows = angles(freqs, cu_seqlens, t.size(0))
        rotated: torch.Tensor = plain(t.unsqueeze(1), rows, config, None, mscale, cp_group, mla_rotary_interleaved)
        return rotated.squeeze(1)

    for module in (rope, attention):
        replace(module, apply_rotary_pos_emb=apply)
