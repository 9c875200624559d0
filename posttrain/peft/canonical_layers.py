"""Layers of canonical LoRA, which has one adapter per Hugging Face projection of a fused matrix.

Megatron-Bridge's own call the adapter of every projection, also of those that have none, and interleave queries, keys
and values by the head count of the whole model, which mixes tokens under tensor parallelism. Here a projection without
an adapter adds nothing, and the interleaving follows the query groups that this process holds.
"""

from typing import Any

import torch
from megatron.bridge.peft.canonical_lora import LoRALinearSplitFC1UpGate, LoRALinearSplitQKV, ModuleDict

QKV = ("adapter_q", "adapter_k", "adapter_v")
GATE_UP = ("adapter_gate", "adapter_up")


class AdapterParts(ModuleDict):
    """The adapters of one matrix by the projection's name; None where a projection has none."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a distributed checkpoint holds of the adapters that are there."""
        sharded: dict[str, Any] = {}
        for name, layer in self.items():
            if layer is not None:
                sharded |= layer.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        return sharded


class SplitQKV(LoRALinearSplitQKV):
    """`linear_qkv` with an adapter for each of q, k and v, or for some of them."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., in] -> [..., groups here * (heads per group + 2) * head size], and a bias that the caller adds."""
        output, bias, hidden = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        config = self.to_wrap.config
        size = config.kv_channels
        heads_per_group = config.num_attention_heads // config.num_query_groups
        groups = output.size(-1) // (size * (heads_per_group + 2))
        widths = (heads_per_group * size, size, size)  # of one group
        parts = []
        for name, width in zip(QKV, widths, strict=True):
            adapter = self.adapter[name]
            if adapter is None:
                part = output.new_zeros(()).expand(*output.shape[:-1], groups, width)
            else:
                part = self.adapter_forward(adapter, hidden, *args, **kwargs).unflatten(-1, (groups, width))
            parts.append(part)
        return output + torch.cat(parts, dim=-1).flatten(-2), bias


class SplitGateUp(LoRALinearSplitFC1UpGate):
    """`linear_fc1` of a gated MLP with an adapter for each of gate and up, or for one of them."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., in] -> [..., 2 * half], gate first, and a bias that the caller adds."""
        output, bias, hidden = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        half = output.size(-1) // 2
        parts = []
        for name in GATE_UP:
            adapter = self.adapter[name]
            if adapter is None:
                part = output.new_zeros(()).expand(*output.shape[:-1], half)
            else:
                part = self.adapter_forward(adapter, hidden, *args, **kwargs)
            parts.append(part)
        return output + torch.cat(parts, dim=-1), bias


def with_missing_parts(module: Any) -> torch.nn.Module:
    """`module`, as the layer above that stands for it if Megatron-Bridge has just wrapped it as one of its own."""
    if type(module) is LoRALinearSplitQKV:
        return SplitQKV(module.to_wrap, AdapterParts(module.adapter.items()))
    if type(module) is LoRALinearSplitFC1UpGate:
        return SplitGateUp(module.to_wrap, AdapterParts(module.adapter.items()))
    return module
