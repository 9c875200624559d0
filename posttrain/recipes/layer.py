"""Put a recipe below the command line: recipe < groups chosen explicitly < overrides.

Hydra merges the files of a defaults list in their order. So a recipe becomes a configuration of its
own, with the defaults list of conf/config.yaml in a different order: first the groups that nobody
chose (the recipe's choice where it has one), then the recipe's values, then the groups that the
command line chooses, each of which may set keys of other groups too. Overrides come last anyway.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from posttrain.config.composition import CONF_DIR
from posttrain.config.containers import as_dict
from posttrain.errors import UserError
from posttrain.recipes import catalog, resolve
from posttrain.recipes.translate import Translation, translate_recipe

KEYS = ("recipe", "recipe.name")


@dataclass
class Layered:
    """A command line with its recipe turned into a configuration.

    Attributes:
        words: the overrides, with the recipe as `recipe.name=NAME`.
        config_name: what to compose instead of the command's own configuration.
        note: for the user: where the run starts from, and what of the recipe is not carried over.
    """

    words: list[str]
    config_name: str
    note: str = ""


def apply(overrides: list[str], config_name: str) -> Layered:
    """Apply the recipe of a command line; without one, change nothing.

    Args:
        overrides: of the command line.
        config_name: file of conf/ that the command composes.

    Raises:
        UserError: no such recipe, several of them, or one that is unavailable here.
    """
    keys = set(map(_key, overrides))
    if keys.isdisjoint(KEYS) or not (CONF_DIR / f"{config_name}.yaml").is_file():
        return Layered(overrides, config_name)
    parsed = _parse(overrides)
    recipes = [item for item in parsed if item.key_or_group in KEYS]
    if not recipes:
        raise UserError("`recipe.name`: can't be read; it is a name, and `recipe=list` prints all")
    if len(recipes) > 1 or recipes[0].is_sweep_override():
        raise UserError("`recipe.name`: one recipe at a time; run the command once for each")
    if keys & {"--config-name", "-cn"}:
        raise UserError("`recipe.name`: a recipe requires conf/config.yaml; remove --config-name")
    others = [override for override in overrides if _key(override) not in KEYS]
    recipe_name = recipes[0].value()
    if recipe_name is None:
        return Layered(others, config_name)
    recipe = catalog.find(str(recipe_name))

    body = _read("config")
    defaults = body.pop("defaults")
    overridden = {item.key_or_group: item for item in parsed}
    chosen = [group for group in _groups(defaults) if group in overridden]
    cache_dir = None
    if "cache_dir" in overridden:
        cache_dir = str(overridden["cache_dir"].value())
    resolved = resolve.resolve_recipe(recipe, cache_dir)
    translation = translate_recipe(recipe.name, resolved, "model" in chosen)

    for key, value in translation.values.items():
        if key.partition(".")[0] not in chosen:
            _set(body, key, value)
    _set(body, "recipe.name", recipe.name)
    body["defaults"] = reorder(defaults, chosen, translation.choices)
    digest = hashlib.sha256(repr([recipe.name, chosen]).encode()).hexdigest()[:12]
    name = f"config_{digest}"
    ConfigStore.instance().store(name=name, node=OmegaConf.create(body))
    if config_name != "config":
        name = _store_including(config_name, name)
    note = describe(recipe.name, translation, chosen)
    return Layered([*others, f"recipe.name={recipe.name}"], name, note)


def check(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse a recipe set in a file: a recipe lies below the files, so no file can choose it.

    Raises:
        UserError: the configuration's recipe is not the command line's.
    """
    cli_value = None
    for override in overrides:
        if _key(override) == "recipe.name":
            cli_value = override.partition("=")[2]
            break
    config_value = OmegaConf.select(cfg, "recipe.name")
    if config_value != cli_value:
        raise UserError(
            f"`recipe.name={config_value}`: has no effect in a configuration file; set it on the command line"
        )


def reorder(defaults: list[Any], chosen: list[str], choices: dict[str, str]) -> list[Any]:
    """The defaults list of conf/config.yaml with the recipe's location in it.

    Args:
        defaults: the list in conf/config.yaml.
        chosen: groups that the command line chooses.
        choices: group -> the recipe's file.
    """
    below, above, hydra_groups = [], [], []
    for item in defaults:
        group = next(iter(item)) if isinstance(item, dict) else item
        if group.startswith("override "):
            hydra_groups.append(item)
        elif group in chosen:
            above.append(item)
        elif group in choices:
            below.append({group: choices[group]})
        elif group != "_self_":
            below.append(item)
    return [*below, "_self_", *above, *hydra_groups]


def describe(name: str, translation: Translation, chosen: list[str]) -> str:
    """Three lines about the recipe, for the start of a run."""
    choices = []
    for group, file in translation.choices.items():
        if group not in chosen:
            choices.append(f"{group}={file}")
    return (
        f"recipe {name} of Megatron-Bridge {catalog.version()}: {' '.join(choices)}\n"
        f"  not carried over: {'; '.join(translation.left_out)}\n"
        f"  all of it, key by key: python -m posttrain.recipes {name}"
    )


def _read(config_name: str) -> dict[str, Any]:
    """A file of conf/, with its defaults list."""
    cfg = OmegaConf.load(CONF_DIR / f"{config_name}.yaml")
    assert isinstance(cfg, DictConfig)
    return as_dict(cfg, resolve=False)


def _key(override: str) -> str:
    return override.partition("=")[0]


def _groups(defaults: list[Any]) -> list[str]:
    """The groups of a defaults list, in its order."""
    groups: list[str] = []
    for item in defaults:
        if isinstance(item, dict):
            groups += item
    return groups


def _store_including(config_name: str, name: str) -> str:
    """Store `config_name`, which includes conf/config.yaml, with `name` in its stead."""
    body = _read(config_name)
    defaults = body["defaults"]
    if "config" not in defaults:
        raise UserError(f"`recipe.name`: posttrain.{config_name} composes no run, so it takes no recipe")
    defaults[defaults.index("config")] = name
    ConfigStore.instance().store(name=f"{config_name}_{name}", node=OmegaConf.create(body))
    return f"{config_name}_{name}"


def _set(body: dict[str, Any], path: str, value: object) -> None:
    """body[a][b][c] = value for the path a.b.c."""
    *parents, last = path.split(".")
    for parent in parents:
        body = body.setdefault(parent, {})
    body[last] = value


def _parse(overrides: list[str]) -> list[Override]:
    """Parse the overrides; those that can't be parsed are left to Hydra's own message."""
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        if override.startswith("-"):
            continue
        try:
            parsed.append(parser.parse_override(override))
        except Exception:  # Hydra reports it better when it composes
            continue
    return parsed
