"""Run recipes and keep what they return as plain data: `python -m posttrain.recipes.resolve FOLDER NAME...`.

In a process of its own, because a recipe needs Megatron. Nothing is asked of the hub: a model that conf/model has gets
its configuration from there, any other one a stand-in, since what a recipe says about training seldom depends on the
model's shape.
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
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.errors import RunFailed, UserError
from posttrain.recipes import names

TIMEOUT_S = 600


def resolved(recipe: names.Recipe, cache_dir: str | None = None) -> dict[str, Any]:
    """What `recipe` returns, from the cache if the installed Megatron-Bridge has been asked before.

    Returns:
        `hub`: the model's hub id; `option`: its name in conf/model or None; `trust_remote_code`: whether its code is on
        the hub; `env_vars`: names of environment variables; `sections`: section of the configuration -> `type`,
        `values` (plain ones), `changed`, the names of the values that are not Megatron-Bridge's defaults, and `strays`,
        those that Megatron-Bridge does not know.

    Raises:
        UserError: the recipe itself raises an error.
        RunFailed: Megatron-Bridge could not be loaded.
    """
    from posttrain.cache import build_once, cache_root

    folder = folder_of(recipe, cache_root(cache_dir))
    build_once(folder, lambda scratch: run(scratch, [recipe.name]))
    found = json.loads((folder / f"{recipe.name}.json").read_text())
    if "error" in found:
        raise UserError(f"`recipe.name={recipe.name}`: {found['error']}")
    return found


def folder_of(recipe: names.Recipe, cache: Path) -> Path:
    """Where a recipe is kept: apart for each version of Megatron-Bridge and of this module."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return cache / "recipes" / f"{names.version()}-{source}" / recipe.name


def run(folder: Path, recipes: list[str]) -> None:
    """Let a new process write FOLDER/NAME.json for each of `recipes`.

    Raises:
        RunFailed: it did not.
    """
    print(f"posttrain: asking Megatron-Bridge {names.version()} for {', '.join(recipes)[:100]} ...", file=sys.stderr)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "posttrain.recipes.resolve", str(folder), *recipes],
            capture_output=True, text=True, timeout=TIMEOUT_S,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"Megatron-Bridge's recipes did not load within {TIMEOUT_S} s") from error
    if done.returncode:
        raise RunFailed(f"Megatron-Bridge's recipes can't be loaded:\n{done.stderr[-2000:]}")


def option_of(hub: str | None) -> str | None:
    """The file of conf/model that has a hub id's architecture. Meta has renamed its Llamas on the hub."""
    return options().get((hub or "").replace("/Meta-", "/"))


@cache
def options() -> dict[str, str]:
    """Hub id -> file of conf/model."""
    from posttrain.compose import CONF_DIR

    found: dict[str, str] = {}
    for path in sorted((CONF_DIR / "model").glob("*.yaml")):
        if (hub := re.search(r"^path: ([\w.-]+/[\w.-]+)", path.read_text(), re.M)) and path.stem != "hf":
            found.setdefault(hub[1].replace("/Meta-", "/"), path.stem)
    return found


class Hub:
    """What stands for `AutoBridge.from_hf_pretrained` while a recipe runs.

    Attributes:
        asked: the hub id that was asked for last.
        made: the provider that was given for it, as it was given.
        trusted: whether the recipe would run Python code from the hub.
    """

    def __init__(self) -> None:
        from megatron.bridge import AutoBridge

        self.asked: str | None = None
        self.made: Any = None
        self.trusted = False
        self._from_config = AutoBridge.from_hf_config
        AutoBridge.from_hf_pretrained = classmethod(lambda cls, path, **options: self.open(path, **options))

    def open(self, path: str, trust_remote_code: bool = False, **options: Any) -> "Hub":
        self.asked, self.trusted = str(path), trust_remote_code
        return self

    def to_megatron_provider(self, load_weights: bool = False, **options: Any) -> Any:
        self.made = self._provider(option_of(self.asked))
        return copy.deepcopy(self.made)

    @cache  # noqa: B019  (there is one Hub, and it lives as long as the process)
    def _provider(self, option: str | None) -> Any:
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        if option is None:
            return GPTModelProvider(num_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=128000)
        from transformers import AutoConfig

        from posttrain.compose import compose
        from posttrain.models.bridges import register
        from posttrain.models.hf import plain

        fields = plain(compose([f"model={option}"]).model.architecture)
        for architecture in fields["architectures"]:
            register(architecture)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return self._from_config(config).to_megatron_provider(load_weights=False)


def describe(function: Any, hub: Hub) -> dict[str, Any]:
    """Call a recipe's function; its result as plain data, see `resolved`."""
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    hub.asked, hub.made, hub.trusted = None, None, False
    try:
        config = function()
    except Exception as error:
        return {
            "error": f"Megatron-Bridge's function fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        }
    config.mixed_precision = get_mixed_precision_config(config.mixed_precision or "bf16_mixed")
    sections = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            sections[name] = section(value, hub.made if name == "model" else None)
    asked = hub.asked or config.tokenizer.tokenizer_model
    return {
        "hub": asked, "option": option_of(asked), "trust_remote_code": hub.trusted, "sections": sections,
        "env_vars": sorted(getattr(config, "env_vars", None) or {}),
    }  # fmt: skip


def section(value: Any, default: Any = None) -> dict[str, Any]:
    """One section: its type, its plain values, and which of them differ from `default`, else from its class's."""
    if default is None:
        try:
            default = type(value)()
        except TypeError:  # some fields have no default: they, at least, were chosen
            default = types.SimpleNamespace(
                **{f.name: f.default for f in dataclasses.fields(value) if f.default is not dataclasses.MISSING}
            )
    own, usual = vars(value), vars(default)
    fields = {f.name for f in dataclasses.fields(value)}
    return {
        "type": type(value).__name__,
        "values": {name: plain(item) for name, item in own.items() if not name.startswith("_")},
        "changed": sorted(
            name for name, item in own.items() if not name.startswith("_") and plain(item) != plain(usual.get(name))
        ),
        # Set by the recipe on an object that has no such field: nobody reads them.
        "strays": sorted(name for name in own if not name.startswith("_") and name not in fields and name not in usual),
    }


def plain(value: Any) -> Any:
    """`value` as JSON has it; what has no such form as text in angle brackets."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in vars(value).items() if not name.startswith("_")}
    return f"<{getattr(value, '__qualname__', None) or str(value).partition(' object at')[0]}>"


def main() -> None:
    """Resolve the recipes named in sys.argv."""
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    from posttrain.convert import process

    process.start()
    # The package's own __init__ imports every recipe, also those of models that draw, which need packages of their own.
    package = types.ModuleType(names.PACKAGE)
    package.__path__ = [str(names.root())]
    sys.modules[names.PACKAGE] = package
    hub = Hub()
    for name in wanted:
        recipe = names.find(name)
        function = getattr(importlib.import_module(recipe.module), recipe.name)
        (folder / f"{name}.json").write_text(json.dumps(describe(function, hub), indent=1))


if __name__ == "__main__":
    main()
