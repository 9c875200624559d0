"""Gemma 2's attention in Transformers, document by document, and this project's layer for the same."""

from types import SimpleNamespace

import torch

SOFTCAP = 50.0


def theirs(states: list[torch.Tensor], lengths: list[int], window: int | None, scale: float) -> torch.Tensor:
    """Transformers' [t, heads, d] for queries [t, heads, d], keys and values [t, groups, d]."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    query, key, _ = states
    module = SimpleNamespace(num_key_value_groups=query.size(1) // key.size(1), training=False)
    parts = []
    for document in zip(*(x.split(lengths) for x in states), strict=True):
        token = torch.arange(len(document[0]), device=query.device)
        distance = token[:, None] - token
        hidden = distance < 0
        if window is not None:
            hidden |= distance > window
        bias = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
        batched = [x.transpose(0, 1)[None] for x in document]
        out, _ = eager_attention_forward(module, *batched, bias, scaling=scale, softcap=SOFTCAP)
        parts.append(out[0])
    return torch.cat(parts)


def capped_layer(attention, head: int, window: int | None, scale: float):
    """A soft-capped attention of this project.

    Args:
        attention: the module posttrain.ops.attention.
        head: width of a head.
        window: how many earlier tokens one sees; None: all.
        scale: of the scores.
    """
    config = SimpleNamespace(
        context_parallel_size=1, kv_channels=head, apply_query_key_layer_scaling=False, attention_dropout=0.0,
        window_size=None if window is None else (window, 0), window_attn_skip_freq=None,
        attn_logit_softcapping=SOFTCAP, softmax_scale=scale,
    )  # fmt: skip
    return attention.SDPAAttention(config, 1, None, "self")


def row_of(ends: list[int], device: str = "cpu") -> SimpleNamespace:
    """What the layer reads of a packed row's parameters."""
    return SimpleNamespace(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32, device=device))
