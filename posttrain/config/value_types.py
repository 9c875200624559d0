"""Values of a group whose keys the schema doesn't have, against the annotations of the class that they go to.

Hydra's schema has the types of most groups. Those of `data`, `template`, `metric` and `logger` depend on the class
that is chosen, which takes whatever it is given and fails later, far from the key.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from posttrain.config import targets
from posttrain.errors import UserError

Hint = type | types.UnionType | types.GenericAlias  # what stands behind the colon of a field

NAMES: dict[Hint, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    Sequence: "a list",
    Mapping: "a mapping",
}


def check(node: DictConfig | ListConfig) -> None:
    """Compare the values of a group, and of the objects in it, with the fields of the dataclass that each names.

    Raises:
        UserError: naming the key, its value and what it may be.
    """
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        inner = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(inner, DictConfig | ListConfig):
            check(inner)
    if isinstance(node, ListConfig):
        return
    target = node.get("_target_")
    kind = None
    if isinstance(target, str):
        kind = targets.find(target, node._get_full_key("_target_"))
    if not is_dataclass(kind):
        return
    try:
        hints = get_type_hints(kind)
    except NameError:  # annotations that are there for type checkers alone
        return
    for field in fields(kind):
        if field.name not in node or OmegaConf.is_missing(node, field.name):
            continue
        value = node[field.name]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        is_object = isinstance(value, dict) and "_target_" in value
        if not is_object and not fits(value, hints[field.name]):
            raise UserError(f"`{node._get_full_key(field.name)}={value}`: must be {describe(hints[field.name])}")


def fits(value: object, hint: Hint) -> bool:
    """Whether a plain value may stand where `hint` is annotated; of kinds of hints that aren't looked at, it may."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if hint in (bool, str, type(None)):
        return type(value) is hint
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) in (int, float)
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value if inner)
    if kind in (Mapping, dict):
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values() if inner)
    return True


def describe(hint: Hint) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(describe, get_args(hint)))
    kind = get_origin(hint) or hint
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))
