"""Items to one row: nothing lost, padding apart, boundaries right."""

import numpy as np
import pytest
import torch

from posttrain.data.collate import collate_items


def item(*lengths):
    size = sum(lengths)
    return {
        "input_ids": np.arange(1, size + 1, dtype=np.int32),
        "labels": np.arange(2, size + 2, dtype=np.int32),
        "loss_mask": np.ones(size, dtype=np.uint8),
        "position_ids": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "seq_lens": np.array(lengths, dtype=np.int32),
    }


def test_padded_to_a_length_each():
    batch = collate_items([item(3, 2), item(8)], 8, pad_id=7)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 7, 7, 7, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["loss_mask"].tolist() == [[1.0] * 5 + [0.0] * 3 + [1.0] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, *range(8)]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8, 16]
    assert batch["cu_seqlens"].dtype == torch.int32 and batch["tokens"].dtype == torch.int64


def test_joined_without_padding_but_for_the_end():
    batch = collate_items([item(3), item(2, 4)], None, pad_id=0, pad_multiple=4)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 9, 12] and batch["tokens"].shape == (1, 12)
    assert batch["loss_mask"].sum() == 9
    assert collate_items([item(4)], None, pad_id=0, pad_multiple=4)["cu_seqlens"].tolist() == [0, 4]


def test_an_item_that_does_not_fit():
    with pytest.raises(ValueError, match="9 tokens does not fit into 8"):
        collate_items([item(9)], 8, 0)
