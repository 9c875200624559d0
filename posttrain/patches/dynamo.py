"""Keep Dynamo, and with it Inductor and sympy, out of a process that compiles nothing."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from posttrain.patches import Platform, patch


class _DisabledDynamo(ModuleType):
    """What torch and transformers ask of `torch._dynamo` without compiling; anything else loads the real module.

    With TORCHDYNAMO_DISABLE=1 no function is ever traced, so marks for the tracer and breaks of its graph are nothing.
    """

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)  # init_process_group, for rules evaluated too early

    @staticmethod
    def disable(fn: Callable | None = None, *args: Any, **kwargs: Any) -> Callable:
        return fn if fn is not None else lambda decorated: decorated

    @staticmethod
    def allow_in_graph(fn: Callable) -> Callable:
        return fn

    @staticmethod
    def assume_constant_result(fn: Callable) -> Callable:
        return fn

    @staticmethod
    def graph_break(msg: str = "") -> None: ...

    def __getattr__(self, name: str) -> Any:
        # `__path__` is asked for by an import of a submodule; other dunders by whoever looks through sys.modules.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _compiles_nothing(platform: Platform) -> bool:
    return platform.device == "cpu"


@patch(
    name="no-dynamo",
    symptom="the first optimizer of a process loads Dynamo, Inductor and sympy (3 s), to tell them to leave it alone",
    versions={"torch": ">=2.9,<2.13"},
    when=_compiles_nothing,
)
def disable_dynamo() -> None:
    """Disable Dynamo and answer for it; a process in which it is loaded already is left as it is."""
    import torch

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" not in sys.modules:
        stand_in = _DisabledDynamo("torch._dynamo", __doc__)
        stand_in.__file__ = str(Path(torch.__file__).parent / "_dynamo" / "__init__.py")
        sys.modules["torch._dynamo"] = stand_in
