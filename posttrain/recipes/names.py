"""Which recipes the installed Megatron-Bridge has: read from its source files, since importing them takes seconds."""

import difflib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.errors import UserError

PACKAGE = "megatron.bridge.recipes"
DEFINITION = re.compile(r'^def ([a-z]\w*_(?:sft|peft)\w*_config)\([^)]*\)[^:]*:\n    """(?:Return )?([^\n"]*)', re.M)
ALIAS = re.compile(r"(\w+_config) as (\w+_config)")
# Folders and functions of models that look, listen or draw. What is trained here reads and writes text.
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
    """The installed Megatron-Bridge's."""
    return importlib.metadata.version("megatron-bridge")


def root() -> Path:
    """The folder of the recipes."""
    return Path(importlib.util.find_spec("megatron.bridge").origin).parent / "recipes"


@cache
def recipes() -> dict[str, Recipe]:
    """Name -> recipe, in the order of the files."""
    found: dict[str, Recipe] = {}
    for path in sorted(root().glob("*/**/*.py")):
        parts = path.relative_to(root()).with_suffix("").parts
        if parts[0] == "utils":
            continue
        for name, summary in DEFINITION.findall(path.read_text(encoding="utf-8")):
            text = not NOT_TEXT.search("/".join([*parts, name]))
            found[name] = Recipe(name, ".".join([PACKAGE, *parts]), summary.strip(), text)
    return found


@cache
def aliases() -> dict[str, str]:
    """Older, shorter names that Megatron-Bridge still knows -> the recipe."""
    found: dict[str, str] = {}
    for path in sorted(root().glob("*/*.py")):
        for name, alias in ALIAS.findall(path.read_text(encoding="utf-8")):
            if name in recipes():
                found[alias] = name
    return found


def find(name: str) -> Recipe:
    """The recipe of that name, or of that older name.

    Raises:
        UserError: there is none, or its model is not one of text.
    """
    recipe = recipes().get(aliases().get(name, name))
    if recipe is None:
        known = [one.name for one in recipes().values() if one.text]
        close = difflib.get_close_matches(name, [*known, *aliases()], n=1, cutoff=0.6)
        meant = f"; did you mean `{close[0]}`?" if close else "."
        raise UserError(
            f"`recipe.name={name}`: Megatron-Bridge {version()} has no such SFT or PEFT recipe{meant} "
            "All of them: python -m posttrain recipe=list"
        )
    if not recipe.text:
        raise UserError(f"`recipe.name={name}`: its model reads images, sound or video; posttrain trains text alone")
    return recipe
