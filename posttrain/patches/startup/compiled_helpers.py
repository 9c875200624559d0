"""The C++ dataset helpers: compiled in the wheel already."""

from pathlib import Path
from types import ModuleType

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, patch, replace


@patch(
    "compile-helpers",
    kind=Kind.STARTUP,
    symptom="start-up runs `make` in a folder where the wheel ships no Makefile, and exits",
    versions={"megatron-core": ">=0.17,<0.20"},
)
def keep_compiled_helpers() -> None:
    """Skip the compilation where there is nothing to compile with; a source checkout still compiles."""

    def skip(module: ModuleType) -> None:
        if module.__file__ and not Path(module.__file__).with_name("Makefile").exists():
            replace(module, compile_helpers=lambda: None)

    on_import("megatron.core.datasets.utils", skip)
