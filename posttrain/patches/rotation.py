"""Where each token of packed sequences stands, and the angles of its rotary embedding (arXiv 2104.09864)."""

import torch

from posttrain.patches.registry import replace


def token_angles(freqs: torch.Tensor, ends: torch.Tensor, total: int, size: int, rank: int) -> torch.Tensor:
    """Look up each token's angles, once per batch: freqs [longest, 1, 1, d] -> [total, 1, 1, d].

    They are kept with the boundaries, which are one batch's.

    Args:
        freqs: angles by position.
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


def token_rotation(
    freqs: torch.Tensor, ends: torch.Tensor, total: int, size: int, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32[total, d / 2] of each token's angles, times `scale`; kept with the boundaries."""
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = getattr(ends, "posttrain_rotation", None)
    if saved is None or saved[0] is not freqs:
        angles = token_angles(freqs, ends, total, size, rank)[:, 0, 0, : freqs.size(-1) // 2].float()
        saved = (freqs, angles.cos() * scale, angles.sin() * scale)
        replace(ends, posttrain_rotation=saved)
    return saved[1], saved[2]


def positions(ends: torch.Tensor, total: int, size: int, rank: int) -> torch.Tensor:
    """Of this process's tokens in their sequences, int[total].

    Context parallelism cuts each sequence into 2 x size chunks, of which a process has the rank-th from the front and
    the rank-th from the back.
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
