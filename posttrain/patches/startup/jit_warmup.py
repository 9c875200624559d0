"""Skip the compilation of fused functions at start-up."""

from types import ModuleType

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, on_gpu, patch, replace


@patch(
    "jit-warmup",
    kind=Kind.STARTUP,
    symptom="start-up compiles fused bias-GELU, dropout and others (4 s), whether the model uses them or not",
    versions={"megatron-bridge": ">=0.6,<0.7"},
    when=on_gpu,
)
def no_warmup() -> None:
    """Leave a fused function to be compiled by the first layer that calls it."""

    def skip(module: ModuleType) -> None:
        replace(module, _warmup_jit_function=lambda *args, **kwargs: None)

    on_import("megatron.bridge.training.initialize", skip)
