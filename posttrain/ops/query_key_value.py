"""Queries, keys and values out of a layer's joint output in one pass: split, normalised, rotated.

Megatron-Core copies the queries out of it, normalises and rotates queries and keys, and Transformer Engine copies keys
and values: up to seven passes over memory and as many back, and their norms compute gradients of frozen weights.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from posttrain.patches.rotation import token_rotation

type Context = Any  # of torch.autograd.Function, which takes whatever attributes it is given
type Gammas = tuple[torch.Tensor, torch.Tensor]


class SplitAndRotate(torch.autograd.Function):
    """The joint output of a layer -> queries, keys and values, of which the first two are normalised and rotated."""

    @staticmethod
    def forward(
        ctx: Context,
        mixed: torch.Tensor,
        groups: int,
        width: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        gammas: Gammas | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute them.

        Args:
            ctx: torch's.
            mixed: [t, (heads + 2 groups) d]; for each group its queries, its key, its value.
            groups: how many keys there are.
            width: d, features of a head.
            cos: float32[t, r / 2], of the first r features of each head, which are rotated.
            sin: as cos.
            gammas: [d] each, frozen weights of RMSNorms of queries and of keys; None: these are not normalised.
            eps: of the norms.

        Returns:
            Queries [t, heads, d], keys and values [t, groups, d].
        """
        from posttrain.ops import rotary_kernels

        ctx.save_for_backward(mixed if gammas else None, cos, sin)
        ctx.gammas = gammas
        ctx.eps = eps
        return rotary_kernels.split_and_rotate(mixed.contiguous(), groups, width, cos, sin, gammas, eps)

    @staticmethod
    def backward(
        ctx: Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None, None]:
        """Gradient of the joint output."""
        from posttrain.ops import rotary_kernels

        mixed, cos, sin = ctx.saved_tensors
        upstream = (query, key, value)
        gradient = rotary_kernels.split_and_rotate_backward(upstream, mixed, cos, sin, ctx.gammas, ctx.eps)
        return gradient, None, None, None, None, None, None


class FusedSelfAttention(SelfAttention):
    """Megatron's self-attention whose queries, keys and values come out of the joint output in one pass."""

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As SelfAttention's."""
        angles = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed and angles is not None and hidden_states.is_cuda:
            self.rotation = self.rotation_of(angles, packed_seq_params, hidden_states)
            rotary_pos_emb = None
        try:
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        finally:
            self.rotation = None

    def rotation_of(
        self, angles: torch.Tensor, packed: PackedSeqParams, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of this process's tokens."""
        ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        context = self.pg_collection.cp
        total = hidden.size(0)
        if self.config.sequence_parallel:
            total *= self.world_size
        scale = self._yarn_concentration_factor
        return token_rotation(angles, ends, total, context.size(), context.rank(), scale)

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Queries [t, 1, heads, d], keys and values [t, 1, groups, d], rotated; else as SelfAttention's."""
        if self.rotation is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        mixed, _ = self.linear_qkv(hidden_states)
        gammas = None
        eps = 0.0
        if has_norm(self.q_layernorm):
            gammas = gamma_of(self.q_layernorm), gamma_of(self.k_layernorm)
            eps = self.q_layernorm.eps
        parts = SplitAndRotate.apply(
            mixed.squeeze(1),
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
            *self.rotation,
            gammas,
            eps,
        )
        return tuple(part.unsqueeze(1) for part in parts)


def has_norm(module: torch.nn.Module | None) -> bool:
    """Whether there is one."""
    return module is not None and not isinstance(module, IdentityOp)


def gamma_of(norm: Any) -> torch.Tensor:
    """What an RMSNorm of Transformer Engine's multiplies with."""
    gamma: torch.Tensor = norm.weight.detach()
    if norm.zero_centered_gamma:
        return gamma + 1
    return gamma


def fuse_attention(layer: torch.nn.Module) -> None:
    """Make one of Megatron's self-attentions a FusedSelfAttention where that is the same thing."""
    if type(layer) is SelfAttention and is_plain(layer):
        layer.__class__ = FusedSelfAttention


def is_plain(layer: SelfAttention) -> bool:
    """Whether a layer has all of its groups' parts here, rotates halves, and has no norms or frozen RMSNorms."""
    config = layer.config
    norms = [norm for norm in (layer.q_layernorm, layer.k_layernorm) if has_norm(norm)]
    frozen = all(not norm.weight.requires_grad and hasattr(norm, "zero_centered_gamma") for norm in norms)
    return (
        len(norms) in (0, 2)
        and frozen
        and (not norms or config.normalization == "RMSNorm")
        and not config.rotary_interleaved
        and not config.no_rope_freq
        and not config.attention_output_gate
        and not config.cpu_offloading
        and config.mrope_section is None
        and config.num_query_groups is not None
        and config.num_query_groups >= layer.world_size
    )
