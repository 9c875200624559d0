"""SDPA core attention against the definition, packed against separate."""

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def attention():
    """(module's class, torch) once Megatron can be imported here."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    import torch

    from posttrain.ops.attention import SDPAAttention

    return SDPAAttention, torch


def config(**changed):
    """What the attention reads of a transformer configuration."""
    values = {
        "context_parallel_size": 1, "kv_channels": 8, "apply_query_key_layer_scaling": False, "attention_dropout": 0.0,
        "window_size": None, "window_attn_skip_freq": None, "attn_logit_softcapping": None, "softmax_scale": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


def reference(torch, q, k, v, scale, window=None, softcap=None):
    """softmax over earlier keys, written out; q [s, heads, d], k and v [s, groups, d]."""
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.size(0))[:, None] - torch.arange(k.size(0))[None]
    hidden = distance < 0
    if window is not None:
        hidden |= distance > window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("changed, window, softcap", [
    ({}, None, None),
    ({"softmax_scale": 0.3}, None, None),
    ({"window_size": (2, 0)}, 2, None),
    ({"attn_logit_softcapping": 1.5}, None, 1.5),
    ({"window_size": (3, 0), "attn_logit_softcapping": 1.5}, 3, 1.5),
    ({"window_size": (2, 0), "window_attn_skip_freq": 2}, 2, None),
])  # fmt: skip
def test_packed_equals_the_definition_per_sequence(attention, changed, window, softcap):
    cls, torch = attention
    torch.manual_seed(0)
    module = cls(config(**changed), 1, None, "self")
    lengths = [5, 1, 7]
    q, k, v = torch.randn(13, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 8)
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 5, 6, 13], dtype=torch.int32))
    out = module(q, k, v, packed_seq_params=packed)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([reference(torch, *part, module.softmax_scale, window, softcap) for part in parts])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_changing_one_sequence_leaves_the_others_to_the_bit(attention):
    cls, torch = attention
    torch.manual_seed(0)
    module = cls(config(), 1, None, "self")
    q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    before = module(q, k, v, packed_seq_params=SimpleNamespace(cu_seqlens_q=ends))
    for tensor in (q, k, v):
        tensor[:5] = torch.randn_like(tensor[:5])
    after = module(q, k, v, packed_seq_params=SimpleNamespace(cu_seqlens_q=ends))
    assert torch.equal(before[5:], after[5:]) and not torch.equal(before[:5], after[:5])


def test_tokens_after_the_last_sequence_are_one_more(attention):
    cls, torch = attention
    module = cls(config(), 1, None, "self")
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    assert module(q, k, v, packed_seq_params=SimpleNamespace(cu_seqlens_q=ends)).shape == (9, 4, 8)


def test_last_queries_of_a_cache(attention):
    cls, torch = attention
    torch.manual_seed(0)
    module = cls(config(), 1, None, "self")
    q, k, v = (torch.randn(6, 1, heads, 8) for heads in (4, 2, 2))
    whole = module(q, k, v)
    torch.testing.assert_close(module(q[-1:], k, v), whole[-1:])
    torch.testing.assert_close(module(q[-3:], k, v), whole[-3:])


def test_context_parallelism_is_refused(attention):
    cls, _ = attention
    with pytest.raises(ValueError, match="context parallelism"):
        cls(config(context_parallel_size=2), 1, None, "self")
