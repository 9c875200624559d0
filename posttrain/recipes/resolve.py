"""What recipes return, from the cache or from a process that runs them, since a recipe needs Megatron (run.py).

The hub is never contacted: a model that conf/model has gets its configuration from there, any other model gets a
stand-in, since a recipe's training settings seldom depend on the model's shape.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.composition import CONF_DIR
from posttrain.errors import RunFailed, UserError
from posttrain.recipes import catalog
from posttrain.utils.cache import build_once, cache_root

if TYPE_CHECKING:
    pass

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
    """A recipe's folder: a separate one for each version of Megatron-Bridge and of what describes its recipes."""
    source = hashlib.sha256(Path(__file__).with_name("description.py").read_bytes()).hexdigest()[:8]
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
            [sys.executable, "-m", "posttrain.recipes.run", str(folder), *recipes],
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
