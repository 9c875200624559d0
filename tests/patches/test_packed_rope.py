"""Packed rows are rotated in one operation, as upstream does sequence by sequence; context parallelism included."""

from types import SimpleNamespace

import pytest
import torch

from posttrain import patches
from posttrain.patches import Platform


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_the_same_as_sequence_by_sequence(size, rank):
    patches.apply(Platform("cpu", False))
    from megatron.core.models.common.embeddings import rope_utils

    group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    lengths = torch.tensor([8, 32, 16, 8, 24, 0, 0])  # filled up with empty sequences, as for a CUDA graph
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    torch.manual_seed(0)
    here = torch.randn(int(ends[-1]) // size, 3, 8)
    freqs = torch.randn(48, 1, 1, 8)  # the longest sequence may be longer than any in this row
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    right = rope_utils._apply_rotary_pos_emb_thd(here, ends, freqs, cp_group=group)
    found = rope_utils.apply_rotary_pos_emb(here, freqs, config, ends, cp_group=group)
    assert torch.equal(found, right)
