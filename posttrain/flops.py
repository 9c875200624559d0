"""Floating-point operations of a training step, for MFU.

A matrix product of a weight costs 2 operations per weight and token forward, 2 for the gradient of its input, 2 for
the weight's own; a frozen weight does not pay the last. Attention over a causal sequence of length s costs
2 s^2 d forward (QK^T and PV, half of each masked away), twice that backward. Recomputation is not counted: it is work,
not progress (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from dataclasses import dataclass
from typing import Any

# Dense bf16 TFLOP/s by the vendors' data sheets, without sparsity.
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "GH200": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "A6000": 155, "RTX 4090": 165,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a GPU by its name, None where unknown."""
    found = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


@dataclass
class Model:
    """What the count needs to know of a model.

    Attributes:
        weights: parameters that take part in matrix products, over all model-parallel processes.
        frozen: whether the base weights are frozen.
        attention: layers x heads x head size.
        peak: operations per second of all GPUs together, None where unknown.
    """

    weights: int
    frozen: bool
    attention: int
    peak: float | None

    @classmethod
    def of(cls, model: list[Any], trainer: Any) -> "Model":
        """Read from a built Megatron model; experts count by how many a token visits."""
        import torch
        from megatron.core.utils import get_model_config

        config = get_model_config(model[0])
        hidden, vocab = config.hidden_size, trainer.vocab_size
        ffn = (
            (config.moe_ffn_hidden_size or config.ffn_hidden_size) if config.num_moe_experts else config.ffn_hidden_size
        )
        visits = config.moe_router_topk if config.num_moe_experts else 1
        mlp = (3 if config.gated_linear_unit else 2) * hidden * ffn * visits
        heads, groups, size = config.num_attention_heads, config.num_query_groups, config.kv_channels
        attention = hidden * size * (2 * heads + 2 * groups)
        device = torch.cuda.get_device_name() if trainer.platform.device == "cuda" else "cpu"
        peak = peak_flops(device)
        return cls(
            weights=config.num_layers * (mlp + attention) + hidden * vocab,
            frozen=trainer.peft is not None,
            attention=config.num_layers * heads * size,
            peak=peak * trainer.world if peak else None,
        )

    def step(self, tokens: float, squared_lengths: float) -> float:
        """Operations of forward and backward over `tokens` tokens in sequences whose squared lengths sum up so."""
        return (4 if self.frozen else 6) * self.weights * tokens + 3 * 2 * self.attention * squared_lengths

    def mfu(self, tokens: float, squared_lengths: float, seconds: float) -> float | None:
        """Share of the hardware's peak that was useful work."""
        return self.step(tokens, squared_lengths) / seconds / self.peak if self.peak and seconds else None
