"""DoRA's trained magnitudes as Hugging Face's PEFT names and divides them; upstream's export leaves them out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.bridge.peft.dora_layers import DoRALinear
from megatron.core import parallel_state


def magnitudes(bridge: Any, parts: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Name in a PEFT file -> magnitudes [out]; empty without DoRA; a collective call.

    Rows of B and magnitudes belong to the same output features, so the bridge's own export of B divides and gathers
    them: for its time each row of B holds the row's magnitude.
    """
    layers = [module for part in parts for module in part.modules() if isinstance(module, DoRALinear)]
    if not layers:
        return {}
    with in_place_of_b(layers):
        return {
            f"base_model.model.{name.removesuffix('.lora_B.weight')}.lora_magnitude_vector": weight[:, 0].clone()
            for name, weight in bridge.export_adapter_weights(parts, cpu=True, show_progress=False)
            if name.endswith(".lora_B.weight")
        }


@contextmanager
def in_place_of_b(layers: list[DoRALinear]) -> Iterator[None]:
    """Fill each layer's B [out here, rank] with its magnitudes, and put it back."""
    kept = []
    for layer in layers:
        b, magnitude = layer.adapter.linear_out.weight, layer.adapter.weight_magnitude.detach()
        if magnitude.numel() > b.size(0):  # of a matrix divided by its input: B is divided, the magnitudes are not
            magnitude = magnitude.chunk(magnitude.numel() // b.size(0))[parallel_state.get_tensor_model_parallel_rank()]
        kept.append((b, b.data))
        b.data = magnitude[:, None].expand_as(b).contiguous()
    try:
        yield
    finally:
        for b, data in kept:
            b.data = data
