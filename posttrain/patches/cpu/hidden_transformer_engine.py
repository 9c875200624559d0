"""Transformer Engine on a machine without a GPU: as if it were not installed."""

import sys

from posttrain.patches.deferred import installed
from posttrain.patches.registry import Kind, Platform, patch


def installed_for_nothing(platform: Platform) -> bool:
    """Whether the package is there and cannot be used."""
    return not platform.transformer_engine and installed("transformer_engine")


@patch(
    "hide-transformer-engine",
    kind=Kind.CPU,
    symptom="an optimizer or a layer of Transformer Engine is chosen for a CPU, because the package is installed",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=installed_for_nothing,
)
def hide_transformer_engine() -> None:
    """Let every import of it fail as if it were not installed."""
    for name in ("transformer_engine", "transformer_engine_torch"):
        sys.modules[name] = None  # type: ignore[assignment]  # an import fails
