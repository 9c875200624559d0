"""Floating-point operations of a training step, for MFU.

A matrix product of a weight costs 2 operations per weight and token forward, 2 for the gradient of
its input, 2 for the weight's own; a frozen weight does not pay the last. Attention over a causal
sequence of length s costs 2 s^2 d forward (QK^T and PV, half of each masked away), twice that
backward. Recomputation is not counted: it is work, not progress (PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, appendix B).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

# Dense bf16 TFLOP/s by the vendors' data sheets, without sparsity.
PEAK_TFLOPS = {
    "B200": 2250,
    "GB200": 2500,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "A6000": 155,
    "RTX 4090": 165,
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations per second of a GPU by its name, None where unknown."""
    known = [name for name in PEAK_TFLOPS if name in device_name]
    if not known:
        return None
    return PEAK_TFLOPS[max(known, key=len)] * 1e12


@dataclass
class ModelFlops:
    """A model's operations.

    Attributes:
        weights: parameters in matrix products, over all model-parallel processes.
        frozen: whether the base weights are frozen.
        attention: layers x heads x head size.
        peak: operations per second of all GPUs together, None where unknown.
    """

    weights: int
    frozen: bool
    attention: int
    peak: float | None

    @classmethod
    def from_model(cls, model: "list[MegatronModule]", vocabulary: int, frozen: bool, gpus: int) -> "ModelFlops":
        """Read from a built Megatron model; experts count by how many a token visits.

        Args:
            model: its chunks.
            vocabulary: rows of the output layer.
            frozen: whether the base weights are frozen.
            gpus: that the run has; 0: a CPU.
        """
        import torch
        from megatron.core.utils import get_model_config

        config = get_model_config(model[0])
        hidden = config.hidden_size
        ffn = config.ffn_hidden_size
        visits = 1
        if config.num_moe_experts:
            ffn = config.moe_ffn_hidden_size or ffn
            visits = config.moe_router_topk
        matrices = 3 if config.gated_linear_unit else 2
        mlp = matrices * hidden * ffn * visits
        heads = config.num_attention_heads
        head_size = config.kv_channels
        attention = hidden * head_size * (2 * heads + 2 * config.num_query_groups)
        peak = None
        if gpus:
            peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            peak *= gpus
        return cls(
            weights=config.num_layers * (mlp + attention) + hidden * vocabulary,
            frozen=frozen,
            attention=config.num_layers * heads * head_size,
            peak=peak,
        )

    def step(self, tokens: float, squared_lengths: float) -> float:
        """Return the operations of a step, forward and backward.

        Args:
            tokens: of the step.
            squared_lengths: sum of the squared lengths of its conversations.
        """
        per_weight = 4 if self.frozen else 6
        return per_weight * self.weights * tokens + 3 * 2 * self.attention * squared_lengths

    def mfu(self, tokens: float, squared_lengths: float, seconds: float) -> float | None:
        """Return the share of the hardware's peak that was useful work, None where unknown."""
        if not self.peak or not seconds:
            return None
        return self.step(tokens, squared_lengths) / seconds / self.peak
