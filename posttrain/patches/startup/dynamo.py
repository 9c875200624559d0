"""Keep Dynamo, and with it Inductor and sympy, out of a process until it compiles something."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from posttrain.patches.registry import Kind, patch

type Function = Callable[..., Any]


class _Settings:
    """`torch._dynamo.config`: what is set waits for the real one, which anything else loads."""

    def __init__(self, dynamo: ModuleType) -> None:
        vars(self)["_dynamo"] = dynamo

    def __setattr__(self, name: str, value: object) -> None:
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dynamo.load().config, name)


class _DisabledDynamo(ModuleType):
    """What torch and transformers ask of `torch._dynamo` without compiling; anything else loads the real module.

    As long as no function is traced, marks for the tracer and breaks of its graph are nothing. On a CPU none ever is
    (TORCHDYNAMO_DISABLE=1); on a GPU the first function that is compiled loads the real module, and what was marked
    before, Transformer Engine's layers, lies outside of it.
    """

    config: _Settings
    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)  # init_process_group, for rules evaluated too early

    @staticmethod
    def disable(fn: Function | None = None, *args: object, **kwargs: object) -> Function:
        return fn if fn is not None else lambda decorated: decorated

    @staticmethod
    def allow_in_graph(fn: Function) -> Function:
        return fn

    @staticmethod
    def assume_constant_result(fn: Function) -> Function:
        return fn

    @staticmethod
    def graph_break(msg: str = "") -> None: ...

    def __getattr__(self, name: str) -> Any:
        # `__path__` is asked for by an import of a submodule; other dunders by whoever looks through sys.modules.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(self.load(), name)

    def load(self) -> ModuleType:
        """The real module, with what was set on this one's configuration."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
            real = importlib.import_module(self.__name__)
            for name, value in vars(self.config).items():
                if name != "_dynamo":
                    setattr(real.config, name, value)
        return importlib.import_module(self.__name__)


@patch(
    "no-dynamo",
    kind=Kind.STARTUP,
    symptom="Transformer Engine's import and the first optimizer of a process load Dynamo, Inductor and sympy (3 s), "
    "only to tell them to leave them alone",
    versions={"torch": ">=2.9,<2.13"},
)
def answer_for_dynamo() -> None:
    """Answer for Dynamo until something is compiled; a process in which it is loaded already is left as it is."""
    import torch

    if "torch._dynamo" not in sys.modules:
        stand_in = _DisabledDynamo("torch._dynamo", __doc__)
        stand_in.config = _Settings(stand_in)
        stand_in.__file__ = str(Path(torch.__file__).parent / "_dynamo" / "__init__.py")
        sys.modules["torch._dynamo"] = stand_in
