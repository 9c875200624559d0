"""Number formats: what `precision=` means on this machine. No torch at import."""

from dataclasses import dataclass

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
            raise UserError("precision=fp8: needs an Ada, Hopper or newer GPU; use precision=auto")
        if self.name == "auto":
            return "bf16" if device == "cuda" else "fp32"
        return self.name

    def dtype(self, device: str) -> str:
        """The name of torch's dtype of weights and activations."""
        return "float32" if self.resolve(device) == "fp32" else "bfloat16"
