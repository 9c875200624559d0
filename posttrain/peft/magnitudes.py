"""DoRA's trained magnitudes as Hugging Face's PEFT names and divides them; upstream's export leaves them out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from megatron.bridge.peft.dora_layers import DoRALinear
from megatron.core import parallel_state

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge

# Ends of tensors' names in a PEFT file.
B = ".lora_B.weight"
MAGNITUDE = ".lora_magnitude_vector"


def export_magnitudes(bridge: "AutoBridge", parts: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Name in a PEFT file -> magnitudes [out]; empty without DoRA; a collective call.

    Rows of B and magnitudes belong to the same output features, so the bridge's own export of B divides and gathers
    them: for its time each row of B holds the row's magnitude.
    """
    layers = dora_layers_of(parts)
    if not layers:
        return {}
    magnitudes = {}
    with in_place_of_b(layers):
        for name, weight in bridge.export_adapter_weights(parts, cpu=True, show_progress=False):
            if name.endswith(B):
                magnitudes[f"base_model.model.{name.removesuffix(B)}{MAGNITUDE}"] = weight[:, 0].clone()
    return magnitudes


def dora_layers_of(parts: list[torch.nn.Module]) -> list[DoRALinear]:
    """The DoRA layers of this process."""
    layers = []
    for part in parts:
        layers += [module for module in part.modules() if isinstance(module, DoRALinear)]
    return layers


@contextmanager
def in_place_of_b(layers: list[DoRALinear]) -> Iterator[None]:
    """Fill each layer's B [out here, rank] with its magnitudes, and put it back."""
    weights = []
    for layer in layers:
        b = layer.adapter.linear_out.weight
        magnitude = layer.adapter.weight_magnitude.detach()
        if magnitude.numel() > b.size(0):  # of a matrix divided by its input: B is divided, the magnitudes are not
            magnitude = magnitude.chunk(magnitude.numel() // b.size(0))[parallel_state.get_tensor_model_parallel_rank()]
        weights.append((b, b.data))
        b.data = magnitude[:, None].expand_as(b).contiguous()
    try:
        yield
    finally:
        for b, data in weights:
            b.data = data
