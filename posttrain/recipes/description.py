"""Call a recipe and describe what it returns as plain data, without a model's weights or the hub; see resolve.py."""

import copy
import dataclasses
import enum
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from transformers import AutoConfig, AutoTokenizer

from posttrain.config.composition import compose
from posttrain.models.bridges import register
from posttrain.models.hf import plain as as_plain
from posttrain.recipes import catalog, resolve

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class NoTokenizer:
    """Stands in for a tokenizer of the hub: of no tokens, for which no embedding has to grow."""

    def __len__(self) -> int:
        return 0


class StandIn(GPTModelProvider):
    """Stands in for the provider of a model that conf/model doesn't have."""

    def to_text_provider(self) -> "StandIn":
        """Return the provider of the text model in a vision model: itself."""
        return self


class Hub:
    """Stands in for `AutoBridge.from_hf_pretrained` and for the hub's tokenizers while a recipe runs.

    Attributes:
        requested: the hub id that was requested last.
        provider: an untouched copy of the provider that was returned for it.
        trusted: whether the recipe would run Python code from the hub.
    """

    def __init__(self) -> None:
        self._from_config = AutoBridge.from_hf_config
        AutoBridge.from_hf_pretrained = classmethod(lambda cls, path, **options: self.open(path, **options))
        AutoTokenizer.from_pretrained = staticmethod(lambda path, **options: NoTokenizer())
        self.reset()

    def reset(self) -> None:
        """Forget what the recipe before has requested."""
        self.requested: str | None = None
        self.provider: GPTModelProvider | None = None
        self.trusted = False

    def open(self, path: str, trust_remote_code: bool = False, **options: object) -> "Hub":
        """Remember the id, as `AutoBridge.from_hf_pretrained`."""
        self.requested = str(path)
        self.trusted = trust_remote_code
        return self

    def to_megatron_provider(self, load_weights: bool = False, **options: object) -> GPTModelProvider:
        """Return the provider of the model that was requested, without its weights."""
        self.provider = self._build_provider(resolve.option_of(self.requested))
        return copy.deepcopy(self.provider)

    @cache  # noqa: B019  (there is one Hub, and it lives as long as the process)
    def _build_provider(self, option: str | None) -> GPTModelProvider:
        if option is None:
            return StandIn(num_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=128000)
        fields = as_plain(compose([f"model={option}"]).model.architecture)
        for architecture in fields["architectures"]:
            register(architecture)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return self._from_config(config).to_megatron_provider(load_weights=False)


def hide_package() -> None:
    """Let a recipe be imported alone: its package imports every other, also those that need further packages."""
    package = types.ModuleType(catalog.PACKAGE)
    package.__path__ = [str(catalog.root())]
    sys.modules[catalog.PACKAGE] = package


def describe(function: Callable[[], ConfigContainer], hub: Hub) -> dict[str, Any]:
    """Call a recipe's function and return its result as plain data, see posttrain.recipes.resolve.resolve_recipe."""
    hub.reset()
    try:
        config = function()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return {"error": f"Megatron-Bridge's function fails: {type(error).__name__}: {text}"}
    config.mixed_precision = get_mixed_precision_config(config.mixed_precision or "bf16_mixed")
    sections = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            sections[name] = describe_section(value, hub.provider if name == "model" else None)
    hub_id = hub.requested or config.tokenizer.tokenizer_model
    return {
        "hub": hub_id,
        "option": resolve.option_of(hub_id),
        "trust_remote_code": hub.trusted,
        "sections": sections,
        "env_vars": sorted(getattr(config, "env_vars", None) or {}),
    }


def describe_section(section: "DataclassInstance", default: object = None) -> dict[str, Any]:
    """Return a section's type, plain values, and the names of those that were changed.

    Args:
        section: an object of any dataclass.
        default: what its values are compared with; None: its class's defaults.
    """
    if default is None:
        default = _default_of(type(section))
    values, changed, strays = {}, [], []
    defaults = vars(default)
    fields = {field.name for field in dataclasses.fields(section)}
    for name, item in vars(section).items():
        if name.startswith("_"):
            continue
        values[name] = plain(item)
        if values[name] != plain(defaults.get(name)):
            changed.append(name)
        # Set by the recipe on an object that has no such field: nobody reads it.
        if name not in fields and name not in defaults:
            strays.append(name)
    return {
        "type": type(section).__name__,
        "values": values,
        "changed": sorted(changed),
        "strays": sorted(strays),
    }


def _default_of(section_type: type) -> Any:
    """An object with the defaults of a dataclass."""
    try:
        return section_type()
    except TypeError:  # some fields have no default: they, at least, were chosen
        defaults = types.SimpleNamespace()
        for field in dataclasses.fields(section_type):
            if field.default is not dataclasses.MISSING:
                setattr(defaults, field.name, field.default)
        return defaults


def plain(value: object) -> Any:
    """Return `value` as JSON has it; what has no such form as text in angle brackets."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in vars(value).items() if name[0] != "_"}
    name = getattr(value, "__qualname__", None) or str(value).partition(" object at")[0]
    return f"<{name}>"
