"""Attention of packed rows on a GPU: output and gradients as near to fp32 as bf16 allows, of heads of any width."""

import itertools
import math

import pytest
import torch

pytestmark = pytest.mark.gpu
TOTAL = 2048
ENDS = {
    "packed": [0, 700, 701, 1500, TOTAL, TOTAL, TOTAL],
    "one row": [0, TOTAL],
    "two rows": [0, TOTAL // 2, TOTAL],
}
WHOLE = {"packed": 0, "one row": 1, "two rows": 2}
HEADS = [(64, 8, 8), (80, 8, 8), (128, 8, 2), (160, 4, 4), (256, 8, 8), (256, 8, 1)]  # features, heads, groups


def defined(q, k, v, ends, window):
    """softmax(Q K^T / sqrt(d)) V of each sequence in fp32: [t, heads d]."""
    groups = q.size(1) // k.size(1)
    parts = []
    for start, end in itertools.pairwise(ends):
        mine, keys, values = (states[start:end].transpose(0, 1) for states in (q, k, v))
        distance = torch.arange(end - start, device="cuda")
        distance = distance[:, None] - distance[None]
        hidden = distance < 0
        if window is not None:
            hidden |= distance > window
        scores = mine @ keys.repeat_interleave(groups, 0).transpose(-1, -2) / math.sqrt(q.size(-1))
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        parts.append((probabilities @ values.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("rows", ENDS)
@pytest.mark.parametrize(("width", "heads", "groups"), HEADS)
def test_is_the_definition(gpu, width, heads, groups, rows, window):
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from posttrain.models.local_spec import choose_attention
    from posttrain.objectives.token_loss import PackedRows

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
        bf16=True,
    )
    attention = TEDotProductAttention(config, 1, AttnMaskType.causal, "self").cuda()
    choose_attention([attention])
    torch.manual_seed(0)
    states = [torch.randn(TOTAL, count, width, device="cuda").bfloat16() for count in (heads, groups, groups)]
    upstream = torch.randn(TOTAL, heads * width, device="cuda").bfloat16()
    ends = torch.tensor(ENDS[rows], dtype=torch.int32, device="cuda")
    packed = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=TOTAL,
        max_seqlen_kv=TOTAL,
        pad_between_seqs=False,
        whole_rows=WHOLE[rows],
    )
    inputs = [state.clone().requires_grad_() for state in states]
    found = attention(*inputs, None, AttnMaskType.causal, packed_seq_params=packed)
    exact_inputs = [state.float().requires_grad_() for state in states]
    exact = defined(*exact_inputs, ENDS[rows], window)
    assert found.shape == exact.shape
    gradients = torch.autograd.grad(found, inputs, upstream)
    expected = torch.autograd.grad(exact, exact_inputs, upstream.float())
    for ours, theirs in zip((found, *gradients), (exact, *expected), strict=True):
        assert ((ours.float() - theirs).norm() / theirs.norm()).item() < 6e-3
