"""Transformer Engine's attention of packed rows, by the kernel that is right and fastest for them. Only on a GPU."""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.varlen import varlen_attn


class PackedAttention(TEDotProductAttention):
    """Attention that lets no packed sequence see another.

    - Rows that are one sequence each are computed as such, without boundaries, which is faster.
    - Other rows are computed by torch's FlashAttention where `flash` says so, in 16 bits,
    - else by Transformer Engine.
    """

    flash = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; packed [t, heads, d] and [t, groups, d] -> [t, heads * d], else as upstream."""
        if packed_seq_params is not None and self.config.context_parallel_size == 1:
            rows = getattr(packed_seq_params, "whole_rows", 0)
            if rows:
                parts = [states.unflatten(0, (rows, -1)) for states in (query, key, value)]
                dense = PackedSeqParams(qkv_format="bshd")
                out = super().forward(*parts, attention_mask, attn_mask_type, packed_seq_params=dense, **kwargs)
                return out.flatten(0, 1)
            if self.flash and query.element_size() == 2:
                return self.attend_by_flash(query, key, value, packed_seq_params)
        return super().forward(
            query, key, value, attention_mask, attn_mask_type, packed_seq_params=packed_seq_params, **kwargs
        )

    def attend_by_flash(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """As `forward`, of packed sequences."""
        out = varlen_attn(
            query,
            key,
            value.contiguous(),
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.flash_attention.softmax_scale,
            window_size=self.window_size,
        )
        assert isinstance(out, torch.Tensor)  # a pair where its sums are asked for as well
        return out.flatten(1)
