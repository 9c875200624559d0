"""Core attention by PyTorch, without Transformer Engine, of whatever a layer is: grouped, windowed, soft-capped.

Megatron's own local attention materialises every score and refuses packed sequences, and no attention has soft-capped
scores. This one lets no packed sequence see another. Which way it is computed depends on the layer and the device:

- without a soft cap, sequence by sequence, by scaled_dot_product_attention;
- with one, on a GPU, the whole row at once, by kernels (capped_attention.py), nothing asked of the device;
- with one, on a CPU, with dropout or beyond the kernels' limits (capped_limits.py), written out.
"""

import itertools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from posttrain.ops import capped_attention
from posttrain.ops.capped_attention import Visible

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig


def sequence_lengths(packed: PackedSeqParams, total: int) -> list[int]:
    """Return the lengths of the packed sequences, read from the device once per batch.

    Args:
        packed: THD parameters; cu_seqlens_q is int32 [n + 1].
        total: tokens of the batch; those after the last boundary are a sequence of padding.
    """
    lengths = getattr(packed, "posttrain_lengths", None)
    if lengths is None:
        ends = packed.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in itertools.pairwise(ends) if end > start]
        padding = total - sum(lengths)
        if padding > 0:
            lengths.append(padding)
        packed.posttrain_lengths = lengths
    return lengths


def first_visible(ends: torch.Tensor, total: int, window: int | None) -> torch.Tensor:
    """int32[total]: the first key that each token of a packed row sees; computed on the device, without a wait.

    Args:
        ends: int32[n + 1], the boundaries of the sequences, of which the last ones may be empty.
        total: tokens of the row; those after the last boundary are a sequence of padding.
        window: how many earlier keys a token sees besides its own; None: all of its sequence.
    """
    token = torch.arange(total, dtype=torch.int32, device=ends.device)
    sequence = torch.searchsorted(ends, token, right=True, out_int32=True) - 1
    first = ends[sequence]
    if window is not None:
        first = torch.maximum(first, token - window)
    return first


class SDPAAttention(MegatronModule):
    """Causal softmax(QK^T * scale)V, with the interface of Megatron's DotProductAttention.

    Args:
        config: transformer configuration; `attn_logit_softcapping`, `window_size`,
            `window_attn_skip_freq` are read where present.
        layer_number: from 1; decides whether this layer has a window.
        softmax_scale: None: 1 / sqrt(head size).
    """

    def __init__(
        self,
        config: "TransformerConfig",
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: "ProcessGroupCollection | None" = None,
        **unused: object,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism requires Transformer Engine's attention")
        if softmax_scale is None:
            softmax_scale = getattr(config, "softmax_scale", None)
        if softmax_scale is None:
            softmax_scale = 1.0 / math.sqrt(config.kv_channels)
        if config.apply_query_key_layer_scaling:
            softmax_scale /= max(1, layer_number)
        if attention_dropout is None:
            attention_dropout = config.attention_dropout
        self.softmax_scale = softmax_scale
        self.dropout = attention_dropout
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        self.window = None  # how many earlier keys a query sees besides its own
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            # (left, right); right is 0 in causal models.
            self.window = config.window_size[0]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d], or packed [t, heads, d].
            key: [s, b, groups, d], or packed [t, groups, d].
            value: as key.
            attention_mask: not used: attention is causal within each sequence.
            packed_seq_params: boundaries of packed sequences.

        Returns:
            [s, b, heads * d], or packed [t, heads, d].
        """
        if packed_seq_params is not None and self.softcap is not None and query.is_cuda:
            return self.attend_row(query, key, value, packed_seq_params, self.softcap)
        if packed_seq_params is None:
            # [s, b, heads, d] -> [b, heads, s, d]
            out = self._attend(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
            return out.permute(2, 0, 1, 3).flatten(2)
        lengths = sequence_lengths(packed_seq_params, query.size(0))
        parts = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            # [t, heads, d] -> [1, heads, t, d]
            out = self._attend(
                q.transpose(0, 1).unsqueeze(0),
                k.transpose(0, 1).unsqueeze(0),
                v.transpose(0, 1).unsqueeze(0),
            )
            parts.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def attend_row(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams, softcap: float
    ) -> torch.Tensor:
        """Soft-capped attention of a packed row at once; see `forward`. Never waits for the device."""
        total = query.size(0)
        window = self.window
        if window is not None and total <= window + 1:
            window = None
        dropped = self.training and self.dropout > 0.0
        if not dropped and capped_attention.is_possible(query, softcap):
            visible = row_visible(packed, total, window)
            return capped_attention.attend(query, key, value, visible, softcap, self.softmax_scale)
        # [t, heads, d] -> [1, heads, t, d]
        q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
        first = first_visible(packed.cu_seqlens_q, total, window)
        mask = _visible(total, total, None, query.device)
        mask &= torch.arange(total, device=query.device) >= first[:, None]
        return self._attend_softcapped(q, k, v, softcap, mask).squeeze(0).transpose(0, 1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of [b, heads, s, d] queries over as many keys, or more.

        With more keys, the queries are the last positions.
        """
        queries = q.size(2)
        keys = k.size(2)
        window = self.window
        if window is not None and keys <= window + 1:
            window = None
        if self.softcap is not None:
            return self._attend_softcapped(q, k, v, self.softcap, _visible(queries, keys, window, q.device))
        mask = None
        causal = queries == keys
        if window is not None or 1 < queries < keys:
            mask = _visible(queries, keys, window, q.device)
            causal = False
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )

    def _attend_softcapped(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float, visible: torch.Tensor
    ) -> torch.Tensor:
        """Attention whose scores are squashed to +-softcap, to the keys that are `visible` [queries, keys]."""
        groups = q.size(1) // k.size(1)
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() * self.softmax_scale
        scores = softcap * torch.tanh(scores / softcap)
        probs = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)
        return F.dropout(probs, self.dropout, self.training) @ v


def row_visible(packed: PackedSeqParams, total: int, window: int | None) -> Visible:
    """What a packed row's queries see, found by the first layer with this window and kept with the row's boundaries.

    Args:
        packed: THD parameters, of one batch.
        total: tokens of the row.
        window: see `first_visible`.
    """
    found: dict[int | None, Visible] = getattr(packed, "posttrain_visible", {})
    if window not in found:
        found[window] = Visible.from_first(first_visible(packed.cu_seqlens_q, total, window))
        packed.posttrain_visible = found
    return found[window]


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool[queries, keys]: which keys each query sees, the queries being the last positions.

    Args:
        queries: their number.
        keys: their number.
        window: how many earlier keys a query sees besides its own; None: all.
        device: of the result.
    """
    query_positions = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = query_positions - torch.arange(keys, device=device)[None]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance <= window)
    return visible
