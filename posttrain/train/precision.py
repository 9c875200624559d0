"""Number formats: what `precision=` means on this machine. No torch at import."""

from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError


@dataclass
class Precision:
    """The config group `precision`.

    Attributes:
        name: auto, fp32, bf16 or fp8; auto is bf16 on a GPU and fp32 on a CPU.
    """

    name: str = "auto"

    def resolve(self, device: str) -> str:
        """The format used on `device` ("cpu" or "cuda").

        Raises:
            UserError: fp8 without a GPU.
        """
        if self.name == "fp8" and device != "cuda":
            raise UserError("precision=fp8: needs a Hopper or newer GPU; use precision=auto")
        if self.name == "auto":
            return "bf16" if device == "cuda" else "fp32"
        return self.name

    def dtype(self, device: str) -> Any:
        """The torch dtype of weights and activations."""
        import torch

        return torch.float32 if self.resolve(device) == "fp32" else torch.bfloat16

    def build(self, device: str, eight_bit_base: bool = False) -> Any:
        """Return Megatron-Bridge's mixed-precision configuration, None for fp32.

        Args:
            device: "cpu" or "cuda".
            eight_bit_base: the products in 8 bits are those of ops/fp8_linear.py, everything around them is bf16.
        """
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        name = self.resolve(device)
        if name == "fp32":
            return None
        if name == "fp8" and not eight_bit_base:
            return get_mixed_precision_config("bf16_with_fp8_current_scaling_mixed")
        return get_mixed_precision_config("bf16_mixed")
