"""Norms for layers without Transformer Engine: what core's wrapper of PyTorch's refuses."""

import copy

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

SEQUENCE_PARALLEL = "sequence_parallel"  # the attribute by which core knows weights whose gradients it has to sum


class ZeroCenteredRMSNorm(torch.nn.Module):
    """x / rms(x) * (1 + weight), in fp32 and cast back, as Hugging Face's GemmaRMSNorm.

    Args:
        config: its `sequence_parallel` marks the weight, whose gradient is then summed over tensor-parallel ranks.
        hidden_size: length of the last dimension.
        eps: added to the mean of squares.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, SEQUENCE_PARALLEL, config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x."""
        normed = torch.nn.functional.rms_norm(x.float(), (x.size(-1),), eps=self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class ZeroCenteredLayerNorm(torch.nn.Module):
    """(x - mean(x)) / deviation(x) * (1 + weight) + bias, in fp32 and cast back, as Hugging Face's NemotronLayerNorm1P.

    Args:
        config: its `sequence_parallel` marks weight and bias, whose gradients are then summed over tensor-parallel
            ranks.
        hidden_size: length of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            setattr(parameter, SEQUENCE_PARALLEL, config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x."""
        gain, shift = 1.0 + self.weight.float(), self.bias.float()
        return torch.nn.functional.layer_norm(x.float(), (x.size(-1),), gain, shift, self.eps).to(x.dtype)


def zero_centered_norm(config: TransformerConfig) -> type[torch.nn.Module]:
    """The norm of a model that stores its gains' difference from one."""
    return ZeroCenteredRMSNorm if config.normalization == "RMSNorm" else ZeroCenteredLayerNorm


class SequenceParallelNorm(WrappedTorchNorm):
    """PyTorch's LayerNorm or RMSNorm as core builds it, also where the sequence is divided.

    Core's wrapper asserts that sequence parallelism is off. What it takes is that the gradients of the norm's weights
    are summed over the tensor-parallel ranks, which core does for parameters that are marked.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        """Return the norm of the last dimension, of length `hidden_size`."""
        undivided = copy.copy(config)
        undivided.sequence_parallel = False
        norm = super().__new__(cls, undivided, hidden_size, eps)
        if config.sequence_parallel:
            for parameter in norm.parameters():
                setattr(parameter, SEQUENCE_PARALLEL, True)
        return norm
