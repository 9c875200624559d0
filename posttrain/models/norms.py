"""RMSNorm with a gain that is stored as its difference from one (Gemma), for layers without Transformer Engine."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


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
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x."""
        normed = torch.nn.functional.rms_norm(x.float(), (x.size(-1),), eps=self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)
