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

    from posttrain.patches.rotation import token_angles

    plain = rope.apply_rotary_pos_emb

    def apply(
        t: torch.Tensor,
        freqs: torch.Tensor,
        config: "TransformerConfig",
        cu_seqlens: torch.Tensor | None = None,
        mscale: float = 1.0,
        cp_group: torch.distributed.ProcessGroup | None = None,
        mla_rotary_interleaved: bool = False,
    ) -> torch.Tensor:
        if cu_seqlens is None:
            return plain(t, freqs, config, cu_seqlens, mscale, cp_group, mla_rotary_interleaved)
        size, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
        rows = token_angles(freqs, cu_seqlens, t.size(0), size, rank)
        rotated: torch.Tensor = plain(t.unsqueeze(1), rows, config, None, mscale, cp_group, mla_rotary_interleaved)
        return rotated.squeeze(1)

    for module in (rope, attention):
        replace(module, apply_rotary_pos_emb=apply)
