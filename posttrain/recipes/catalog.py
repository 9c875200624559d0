"""The recipes of the installed Megatron-Bridge, read from its source files.

Importing them would take seconds.
"""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.errors import UserError
from posttrain.utils.suggest import did_you_mean

PACKAGE = "megatron.bridge.recipes"
DEFINITION = re.compile(r'^def ([a-z]\w*_(?:sft|peft)\w*_config)\([^)]*\)[^:]*:\n    """(?:Return )?([^\n"]*)', re.M)
ALIAS = re.compile(r"(\w+_config) as (\w+_config)")
# Folders and functions of image, audio and video models. Only text models are trained here.
NOT_TEXT = re.compile(r"_vl|omni|audio|flux|wan|stepfun")


@dataclass(frozen=True)
class Recipe:
    """One of Megatron-Bridge's functions for supervised or parameter-efficient fine-tuning.

    Attributes:
        name: of the function.
        module: dotted name of its module.
        summary: first line of its docstring.
        text: whether its model is one of text alone.
    """

    name: str
    module: str
    summary: str
    text: bool


def version() -> str:
    """The version of the installed Megatron-Bridge."""
    return importlib.metadata.version("megatron-bridge")


def root() -> Path:
    """The folder of the recipes."""
    spec = importlib.util.find_spec("megatron.bridge")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "recipes"


@cache
def recipes() -> dict[str, Recipe]:
    """Return name -> recipe, in the order of the files."""
    by_name: dict[str, Recipe] = {}
    for path in sorted(root().glob("*/**/*.py")):
        parts = path.relative_to(root()).with_suffix("").parts
        if parts[0] == "utils":
            continue
        for name, summary in DEFINITION.findall(path.read_text(encoding="utf-8")):
            text = not NOT_TEXT.search("/".join([*parts, name]))
            by_name[name] = Recipe(name, ".".join([PACKAGE, *parts]), summary.strip(), text)
    return by_name


@cache
def aliases() -> dict[str, str]:
    """Older, shorter names that Megatron-Bridge still knows -> the recipe."""
    recipe_names: dict[str, str] = {}
    for path in sorted(root().glob("*/*.py")):
        for name, alias in ALIAS.findall(path.read_text(encoding="utf-8")):
            if name in recipes():
                recipe_names[alias] = name
    return recipe_names


def find(name: str) -> Recipe:
    """Return the recipe with that name, or with that older name.

    Raises:
        UserError: there is none, or its model is not a text model.
    """
    recipe = recipes().get(aliases().get(name, name))
    if recipe is None:
        usable = [known.name for known in recipes().values() if known.text]
        hint = did_you_mean(name, [*usable, *aliases()]) or "."
        raise UserError(
            f"`recipe.name={name}`: Megatron-Bridge {version()} has no such SFT or PEFT recipe{hint} "
            "All of them: python -m posttrain recipe=list"
        )
    if not recipe.text:
        raise UserError(
            f"`recipe.name={name}`: its model is an image, audio or video model; posttrain trains text models only"
        )
    return recipe


def format_list() -> str:
    """Every recipe for text models with its summary, in the order of their folders."""
    every = recipes()
    usable = [recipe for recipe in every.values() if recipe.text]
    width = max(len(recipe.name) for recipe in usable)
    lines = [f"{len(usable)} recipes of Megatron-Bridge {version()}; start from one with recipe.name=NAME\n"]
    for recipe in usable:
        lines.append(f"{recipe.name:<{width}}  {recipe.summary}")
    others = len(every) - len(usable)
    lines.append(f"\n{others} more train image, audio or video models, which posttrain does not support.")
    return "\n".join(lines)
