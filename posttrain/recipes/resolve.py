"""Run recipes and store what they return: `python -m posttrain.recipes.resolve FOLDER NAME...`.

In a process of its own, because a recipe needs Megatron. The hub is never contacted: a model that
conf/model has gets its configuration from there, any other model gets a stand-in, since a recipe's
training settings seldom depend on the model's shape.
"""

import copy
import dataclasses
import enum
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.composition import CONF_DIR, compose
from posttrain.errors import RunFailed, UserError
from posttrain.recipes import catalog
from posttrain.utils.cache import build_once, cache_root

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.config import ConfigContainer

TIMEOUT_S = 600


def resolve_recipe(recipe: catalog.Recipe, cache_dir: str | None = None) -> dict[str, Any]:
    """Return what `recipe` returns, from the cache if this Megatron-Bridge has run it before.

    Returns:
        `hub`: the model's hub id; `option`: its name in conf/model or None; `trust_remote_code`:
        whether its code is on the hub; `env_vars`: names of environment variables; `sections`:
        section of the configuration -> `type`, `values` (plain ones), `changed`, the names of the
        values that are not Megatron-Bridge's defaults, and `strays`, those that Megatron-Bridge
        does not know.

    Raises:
        UserError: the recipe itself raises an error.
        RunFailed: Megatron-Bridge could not be loaded.
    """
    folder = cache_folder(recipe, cache_root(cache_dir))
    build_once(folder, lambda scratch: run_recipes(scratch, [recipe.name]))
    resolved = json.loads((folder / f"{recipe.name}.json").read_text(encoding="utf-8"))
    if "error" in resolved:
        raise UserError(f"`recipe.name={recipe.name}`: {resolved['error']}")
    return resolved


def cache_folder(recipe: catalog.Recipe, cache: Path) -> Path:
    """A recipe's folder: a separate one for each version of Megatron-Bridge and of this module."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return cache / "recipes" / f"{catalog.version()}-{source}" / recipe.name


def run_recipes(folder: Path, recipes: list[str]) -> None:
    """Let a new process write FOLDER/NAME.json for each of `recipes`.

    Raises:
        RunFailed: it did not.
    """
    listed = ", ".join(recipes)[:100]
    print(f"posttrain: running {listed} of Megatron-Bridge {catalog.version()} ...", file=sys.stderr)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "posttrain.recipes.resolve", str(folder), *recipes],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"Megatron-Bridge's recipes did not load within {TIMEOUT_S} s") from error
    if done.returncode:
        raise RunFailed(f"Megatron-Bridge's recipes can't be loaded:\n{done.stderr[-2000:]}")


def option_of(hub: str | None) -> str | None:
    """Return the file of conf/model with a hub id's architecture.

    Meta has renamed its Llamas on the hub: the older names are known too.
    """
    return options().get((hub or "").replace("/Meta-", "/"))


@cache
def options() -> dict[str, str]:
    """Return hub id -> file of conf/model."""
    options_by_hub: dict[str, str] = {}
    for path in sorted((CONF_DIR / "model").glob("*.yaml")):
        hub = re.search(r"^path: ([\w.-]+/[\w.-]+)", path.read_text(encoding="utf-8"), re.M)
        if hub and path.stem != "hf":
            options_by_hub.setdefault(hub[1].replace("/Meta-", "/"), path.stem)
    return options_by_hub


class Hub:
    """Stands in for `AutoBridge.from_hf_pretrained` while a recipe runs.

    Attributes:
        requested: the hub id that was requested last.
        provider: an untouched copy of the provider that was returned for it.
        trusted: whether the recipe would run Python code from the hub.
    """

    def __init__(self) -> None:
        from megatron.bridge import AutoBridge

        self._from_config = AutoBridge.from_hf_config
        AutoBridge.from_hf_pretrained = classmethod(lambda cls, path, **options: self.open(path, **options))
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

    def to_megatron_provider(self, load_weights: bool = False, **options: object) -> "GPTModelProvider":
        """Return the provider of the model that was requested, without its weights."""
        self.provider = self._build_provider(option_of(self.requested))
        return copy.deepcopy(self.provider)

    @cache  # noqa: B019  (there is one Hub, and it lives as long as the process)
    def _build_provider(self, option: str | None) -> "GPTModelProvider":
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        if option is None:
            return GPTModelProvider(num_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=128000)
        from transformers import AutoConfig

        from posttrain.models.bridges import register
        from posttrain.models.hf import plain

        fields = plain(compose([f"model={option}"]).model.architecture)
        for architecture in fields["architectures"]:
            register(architecture)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return self._from_config(config).to_megatron_provider(load_weights=False)


def describe(function: "Callable[[], ConfigContainer]", hub: Hub) -> dict[str, Any]:
    """Call a recipe's function and return its result as plain data, see `resolve_recipe`."""
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

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
        "option": option_of(hub_id),
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
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in vars(value).items() if name[0] != "_"}
    name = getattr(value, "__qualname__", None) or str(value).partition(" object at")[0]
    return f"<{name}>"


def main() -> None:
    """Resolve the recipes given in sys.argv."""
    folder = Path(sys.argv[1])
    from posttrain.convert import single_process

    single_process.start()
    # The package's own __init__ imports every recipe, also those of image models, which need
    # further packages.
    package = types.ModuleType(catalog.PACKAGE)
    package.__path__ = [str(catalog.root())]
    sys.modules[catalog.PACKAGE] = package
    hub = Hub()
    for name in sys.argv[2:]:
        recipe = catalog.find(name)
        function = getattr(importlib.import_module(recipe.module), recipe.name)
        description = describe(function, hub)
        (folder / f"{name}.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
