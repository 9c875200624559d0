"""Put a recipe below what the command line says: recipe < groups chosen explicitly < options given explicitly.

Hydra merges the files of a defaults list in their order. So a recipe becomes a configuration of its own, with the
defaults list of conf/config.yaml in another order: the groups that nobody chose (the recipe's choice where it has one),
the recipe's values, the groups that the command line chooses, each of which may set keys of other groups too. The
command line's options come last anyway.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from posttrain.errors import UserError
from posttrain.recipes import names, resolve
from posttrain.recipes.translate import Translation, translate

KEYS = ("recipe", "recipe.name")


@dataclass
class Layered:
    """A command line with its recipe turned into a configuration.

    Attributes:
        words: the command line, with the recipe as `recipe.name=NAME`.
        config_name: what to compose instead of the command's own configuration.
        note: for the person at the keyboard: where the run begins, and what of the recipe is not carried over.
    """

    words: list[str]
    config_name: str
    note: str = ""


def apply(words: list[str], config_name: str) -> Layered:
    """Take the recipe of a command line into account; without one, change nothing.

    Args:
        words: the command line.
        config_name: file of conf/ that the command composes.

    Raises:
        UserError: no such recipe, several of them, or one that can't be had here.
    """
    from posttrain.compose import CONF_DIR

    if not any(word.partition("=")[0] in KEYS for word in words) or not (CONF_DIR / f"{config_name}.yaml").is_file():
        return Layered(words, config_name)
    overrides = _parse(words)
    asked = [item for item in overrides if item.key_or_group in KEYS]
    if len(asked) > 1 or asked[0].is_sweep_override():
        raise UserError("`recipe.name`: one recipe at a time; run the command once for each")
    if any(word.split("=")[0] in ("--config-name", "-cn") for word in words):
        raise UserError("`recipe.name`: a recipe begins from conf/config.yaml, leave --config-name out")
    value = asked[0].value()
    others = [word for word in words if word.partition("=")[0] not in KEYS]
    if value is None:
        return Layered(others, config_name)
    recipe = names.find(str(value))

    main = OmegaConf.load(CONF_DIR / "config.yaml")
    defaults = OmegaConf.to_container(main.pop("defaults"))
    groups = [group for item in defaults if isinstance(item, dict) for group in item]
    chosen = [group for group in groups if any(item.key_or_group == group for item in overrides)]
    cache_dir = next((item.value() for item in overrides if item.key_or_group == "cache_dir"), None)
    translation = translate(recipe.name, resolve.resolved(recipe, cache_dir), "model" in chosen)

    values = {key: value for key, value in translation.values.items() if key.partition(".")[0] not in chosen}
    body: dict[str, Any] = OmegaConf.to_container(main)
    for key, value in {**values, "recipe.name": recipe.name}.items():
        _set(body, key, value)
    body["defaults"] = reorder(defaults, chosen, translation.choices)
    name = f"config_{hashlib.sha256(repr([recipe.name, chosen]).encode()).hexdigest()[:12]}"
    ConfigStore.instance().store(name=name, node=OmegaConf.create(body))
    if config_name != "config":
        name = _including(config_name, name)
    return Layered([*others, f"recipe.name={recipe.name}"], name, note(recipe.name, translation, chosen))


def check(cfg: DictConfig, words: list[str]) -> None:
    """Refuse a recipe that a file names: what is below the files can't be in one of them.

    Raises:
        UserError: the configuration's recipe is not the command line's.
    """
    said = next((word.partition("=")[2] for word in words if word.startswith("recipe.name=")), None)
    named = OmegaConf.select(cfg, "recipe.name")
    if named != said:
        raise UserError(f"`recipe.name={named}`: in a configuration file it has no effect; say it on the command line")


def reorder(defaults: list[Any], chosen: list[str], choices: dict[str, str]) -> list[Any]:
    """The defaults list of conf/config.yaml with the recipe's place in it.

    Args:
        defaults: the list in conf/config.yaml.
        chosen: groups that the command line chooses.
        choices: the recipe's files of groups.
    """
    below, above, overriding = [], [], []
    for item in defaults:
        group = next(iter(item)) if isinstance(item, dict) else item
        if group.startswith("override "):
            overriding.append(item)
        elif group in chosen:
            above.append(item)
        elif group != "_self_":
            below.append({group: choices[group]} if group in choices else item)
    return [*below, "_self_", *above, *overriding]


def note(name: str, translation: Translation, chosen: list[str]) -> str:
    """What to tell about the recipe in three lines."""
    begins = " ".join(f"{group}={file}" for group, file in translation.choices.items() if group not in chosen)
    left = "; ".join(translation.left_out)
    return (
        f"recipe {name} of Megatron-Bridge {names.version()}: {begins}\n"
        f"  not carried over: {left}\n"
        f"  all of it, key by key: python -m posttrain.recipes {name}"
    )


def _including(config_name: str, name: str) -> str:
    """A configuration that includes conf/config.yaml, as preview's does, including `name` instead."""
    from posttrain.compose import CONF_DIR

    body = OmegaConf.to_container(OmegaConf.load(CONF_DIR / f"{config_name}.yaml"))
    if "config" not in body["defaults"]:
        raise UserError(f"`recipe.name`: posttrain.{config_name} composes no run, so no recipe")
    body["defaults"] = [name if item == "config" else item for item in body["defaults"]]
    ConfigStore.instance().store(name=f"{config_name}_{name}", node=OmegaConf.create(body))
    return f"{config_name}_{name}"


def _set(body: dict[str, Any], path: str, value: Any) -> None:
    """body[a][b][c] = value for the path a.b.c."""
    *parents, last = path.split(".")
    for parent in parents:
        body = body.setdefault(parent, {})
    body[last] = value


def _parse(words: list[str]) -> list[Override]:
    """The overrides among `words`, those that can't be read left to Hydra's own message."""
    parser, found = OverridesParser.create(), []
    for word in words:
        if not word.startswith("-"):
            try:
                found.append(parser.parse_override(word))
            except Exception:  # Hydra says it better, when it composes
                continue
    return found
