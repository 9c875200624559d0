"""Canonical LoRA (one adapter per Hugging Face projection): some of the projections, and tensor parallelism."""

from posttrain.patches import patch


@patch(
    "canonical-lora-parts",
    symptom="an adapter on q_proj and v_proj alone calls the missing k_proj's ('NoneType' object is not callable); "
    "with tensor parallelism the parts are interleaved by the global head count, which mixes tokens",
    versions={"megatron-bridge": ">=0.6,<0.7"},
)
def canonical_lora_parts() -> None:
    """Let missing parts add nothing, and interleave by the groups that this process has."""
    from megatron.bridge.peft import canonical_lora

    def split_qkv(self, x, *args, **kwargs):
        linear_output, bias, hidden = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return linear_output, bias
        config = self.to_wrap.config
        size, per_group = config.kv_channels, config.num_attention_heads // config.num_query_groups
        leading, groups = linear_output.shape[:-1], linear_output.size(-1) // (size * (per_group + 2))
        parts = []
        for name, width in (("adapter_q", per_group * size), ("adapter_k", size), ("adapter_v", size)):
            adapter = self.adapter[name]
            if adapter is None:
                part = linear_output.new_zeros(()).expand(*leading, groups, width)
            else:
                part = self.adapter_forward(adapter, hidden, *args, **kwargs).unflatten(-1, (groups, width))
            parts.append(part)
        return linear_output + torch.cat(parts, dim=-1).flatten(-2), bias  # [..., groups * (heads + 2) * size]

    def split_gate_up(self, x, *args, **kwargs):
        linear_output, bias, hidden = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return linear_output, bias
        half = linear_output.size(-1) // 2
        parts = [
            linear_output.new_zeros(()).expand(*linear_output.shape[:-1], half)
            if self.adapter[name] is None
            else self.adapter_forward(self.adapter[name], hidden, *args, **kwargs)
            for name in ("adapter_gate", "adapter_up")
        ]
        return linear_output + torch.cat(parts, dim=-1), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {
            key: value
            for name, layer in self.items()
            if layer is not None
            for key, value in layer.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata).items()
        }

    import torch

    canonical_lora.LoRALinearSplitQKV.forward = split_qkv
    canonical_lora.LoRALinearSplitFC1UpGate.forward = split_gate_up
    canonical_lora.ModuleDict.sharded_state_dict = sharded_state_dict
