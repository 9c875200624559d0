"""Dataset items to one packed (THD) row of tensors."""

from collections.abc import Sequence

import numpy as np
import torch


def collate(
    items: Sequence[dict[str, np.ndarray]], length: int | None, pad_id: int, pad_multiple: int = 1
) -> dict[str, torch.Tensor | int]:
    """Join items into one row.

    Args:
        items: of `posttrain.data.dataset.Bins`.
        length: tokens per item; each is padded to it at its end. None: items follow each other without padding.
        pad_id: any valid token id; padding is untrained by position, never by its id.
        pad_multiple: with `length` None, the row is padded to a multiple of this many tokens.

    Returns:
        tokens, labels, position_ids int64[1, T], loss_mask float32[1, T], cu_seqlens int32[sequences + 1], each padding
        a sequence of its own, and max_seqlen, an int.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("input_ids", "labels", "loss_mask", "position_ids")}
    lengths: list[np.ndarray] = []

    def pad(count: int) -> None:
        if count:
            padding = np.full(count, pad_id)
            for name, values in zip(parts, (padding, padding, np.zeros(count), np.arange(count)), strict=True):
                parts[name].append(values)
            lengths.append(np.array([count]))

    total = 0
    for item in items:
        size = len(item["input_ids"])
        if length is not None and size > length:
            raise ValueError(f"collate: an item of {size} tokens does not fit into {length}")
        for name, values in parts.items():
            values.append(item[name])
        lengths.append(item["seq_lens"])
        total += size
        if length is not None:
            pad(length - size)
    if length is None:
        pad(-total % pad_multiple)
    sizes = np.concatenate(lengths)
    row = {name: torch.from_numpy(np.concatenate(values).astype(np.int64))[None] for name, values in parts.items()}
    return {
        "tokens": row["input_ids"],
        "labels": row["labels"],
        "loss_mask": row["loss_mask"].float(),
        "position_ids": row["position_ids"],
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)),
        "max_seqlen": int(sizes.max()),
    }
