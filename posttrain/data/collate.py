"""Join dataset items into one packed (THD) sequence of tensors."""

from collections.abc import Sequence

import numpy as np
import torch

NAMES = ("input_ids", "labels", "position_ids")


def collate_items(
    items: Sequence[dict[str, np.ndarray]], length: int | None, pad_id: int, pad_multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Join items into one sequence.

    Args:
        items: of `posttrain.data.dataset.PackedDataset`; loss_mask may hold weights.
        length: tokens per item; each is padded to it at its end. None: items follow each other
            without padding.
        pad_id: any valid token id; padding is untrained by position, never by its id.
        pad_multiple: with `length` None, the result is padded to a multiple of this many tokens.

    Returns:
        tokens, labels, position_ids int64[1, T]; loss_mask float32[1, T]; cu_seqlens
        int32[sequences + 1], each padding a sequence of its own.
    """
    parts = []
    total = 0
    for item in items:
        size = len(item["input_ids"])
        if length is not None and size > length:
            raise ValueError(f"collate: an item of {size} tokens does not fit into {length}")
        parts.append(item)
        total += size
        if length is not None and size < length:
            parts.append(_padding(length - size, pad_id))
    if length is None and total % pad_multiple:
        parts.append(_padding(-total % pad_multiple, pad_id))
    tensors = {}
    for name in NAMES:
        tensors[name] = torch.from_numpy(_joined(parts, name).astype(np.int64))[None]
    weights = _joined(parts, "loss_mask")
    boundaries = np.concatenate([[0], np.cumsum(_joined(parts, "seq_lens"))])
    return {
        "tokens": tensors["input_ids"],
        "labels": tensors["labels"],
        "loss_mask": torch.from_numpy(weights.astype(np.float32))[None],
        "position_ids": tensors["position_ids"],
        "cu_seqlens": torch.from_numpy(boundaries.astype(np.int32)),
    }


def _joined(parts: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([part[name] for part in parts])


def _padding(count: int, pad_id: int) -> dict[str, np.ndarray]:
    """An untrained item of `count` tokens."""
    return {
        "input_ids": np.full(count, pad_id),
        "labels": np.full(count, pad_id),
        "loss_mask": np.zeros(count),
        "position_ids": np.arange(count),
        "seq_lens": np.array([count]),
    }
