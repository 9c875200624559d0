"""Compilation before it is needed."""

from types import ModuleType

from posttrain.patches import patch
from posttrain.patches.deferred import on_import


@patch(
    "jit-warmup",
    symptom="start-up compiles fused bias-GELU, dropout and others (4 s), whether the model uses them or not",
    versions={"megatron-bridge": ">=0.6,<0.7"},
    when=lambda platform: platform.device == "cuda",
)
def no_warmup() -> None:
    """Leave a fused function to be compiled by the first layer that calls it."""

    def skip(module: ModuleType) -> None:
        module._warmup_jit_function = lambda *args, **kwargs: None

    on_import("megatron.bridge.training.initialize", skip)
