"""Floating-point operations of a training step, for MFU.

A matrix product of a weight costs 2 operations per weight and token forward, 2 for the gradient of
its input, 2 for the weight's own; a frozen weight does not pay the last. Attention over a causal
sequence of length s costs 2 s^2 d forward (QK^T and PV, half of each masked away), twice that
backward. Recomputation is not counted: it is work, not progress (PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, appendix B).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.spec.shape import Shape, layer_products
from posttrain.utils.gpus import peak_tflops

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


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
    def from_shape(cls, shape: Shape, frozen: bool, peak: float | None = None) -> "ModelFlops":
        """Count those of a model that has not been built; see the attributes for the arguments."""
        return cls(shape.products, frozen, shape.layers * shape.query, peak)

    @classmethod
    def from_model(cls, model: "list[MegatronModule]", vocabulary: int, frozen: bool, gpus: int) -> "ModelFlops":
        """Count those of a built Megatron model, of any family.

        Args:
            model: its chunks.
            vocabulary: rows of the output layer.
            frozen: whether the base weights are frozen.
            gpus: that the run has; 0: a CPU.
        """
        import torch
        from megatron.core.utils import get_model_config

        config = get_model_config(model[0])
        ffn = config.ffn_hidden_size
        visited = 1
        if config.num_moe_experts:
            ffn = config.moe_ffn_hidden_size or ffn
            visited = config.moe_router_topk
        query = config.num_attention_heads * config.kv_channels
        layer = layer_products(
            hidden=config.hidden_size,
            query=query,
            key=config.num_query_groups * config.kv_channels,
            ffn=ffn,
            gate=config.gated_linear_unit,
            visited=visited,
        )
        peak = None
        if gpus:
            tflops = peak_tflops(torch.cuda.get_device_name())
            if tflops is not None:
                peak = gpus * tflops * 1e12
        return cls(
            weights=config.num_layers * layer + config.hidden_size * vocabulary,
            frozen=frozen,
            attention=config.num_layers * query,
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
