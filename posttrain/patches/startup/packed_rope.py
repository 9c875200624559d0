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

    def angles(freqs: torch.Tensor, ends: torch.Tensor, total: int, size: int, rank: int) -> torch.Tensor:
        """freqs [longest, 1, 1, d] -> [total, 1, 1, d]; kept with the boundaries, which are one batch's.

        Args:
            freqs: by position.
            ends: cumulative lengths of the whole sequences.
            total: tokens here.
            size: of context parallelism.
            rank: of this process in it.
        """
        saved: tuple[torch.Tensor, torch.Tensor] | None = getattr(ends, "posttrain_angles", None)
        if saved is None or saved[0] is not freqs:
            position = positions(ends, total, size, rank)
            # Tokens after the last sequence are padding: clamping gives them some angle, their output is masked.
            saved = (freqs, freqs.index_select(0, position.clamp(max=freqs.size(0) - 1)))
            replace(ends, posttrain_angles=saved)
        return saved[1]

    def positions(ends: torch.Tensor, total: int, size: int, rank: int) -> torch.Tensor:
        """Of this process's tokens in their sequences, int[total].

        Context parallelism cuts each sequence into 2 x size chunks, of which a process has the rank-th from the front
        and the rank-th from the back.
        """
        token = torch.arange(total, device=ends.device, dtype=ends.dtype)
        here = ends // size
        sequence = torch.searchsorted(here, token, right=True) - 1
        offset = token - here[sequence]
        if size == 1:
            return offset
        following = (sequence + 1).clamp(max=ends.numel() - 1)
        chunk = (here[following] - here[sequence]) // 2
        return torch.where(offset < chunk, rank * chunk + offset, (2 * size - 2 - rank) * chunk + offset)

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
        rows = angles(freqs, cu_seqlens, t.size(0), size, rank)
        rotated: torch.Tensor = plain(t.unsqueeze(1), rows, config, None, mscale, cp_group, mla_rotary_interleaved)
        return rotated.squeeze(1)

    for module in (rope, attention):
        replace(module, apply_rotary_pos_emb=apply)
