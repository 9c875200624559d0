"""The configuration of a run as it is kept in files: every interpolation resolved once, and none ever again.

A value may hold the text `${...}`, which OmegaConf would take for an interpolation when the file is read: it is written
escaped, and a file in which one isn't was not written here, and is refused.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.config import secrets, yaml_file
from posttrain.errors import UserError

OPENING = re.compile(r"(\\*)\$\{")


def text(cfg: DictConfig) -> str:
    """`cfg` as YAML: read back by `read`, or by OmegaConf itself, it has the values that `cfg` has now."""
    values = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return OmegaConf.to_yaml(literal(values))


def literal(values: dict[Any, Any]) -> DictConfig:
    """A configuration of `values` as they are: `${...}` in a text is text."""
    return OmegaConf.create({key: map_texts(value, _escape) for key, value in values.items()})


def read(run_dir: Path, name: str = "config.yaml") -> DictConfig:
    """The configuration in the file `name` of a run directory or checkpoint, which `text` wrote.

    Raises:
        UserError: see `yaml_file.read_in`; or it holds an interpolation.
    """
    secrets.register()
    cfg = yaml_file.read_in(run_dir, name)
    map_texts(OmegaConf.to_container(cfg, resolve=False), lambda value: _refuse_interpolation(value, run_dir / name))
    return cfg


def unescaped(values: dict[str, Any]) -> dict[str, Any]:
    """What plain YAML made of a file that `text` wrote, as the values that were written."""
    return {key: map_texts(value, _unescape) for key, value in values.items()}


def map_texts(node: object, change: Callable[[str], str]) -> object:
    """Plain values with every text at any depth changed; keys of mappings stay."""
    if isinstance(node, str):
        return change(node)
    if isinstance(node, dict):
        return {key: map_texts(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [map_texts(value, change) for value in node]
    return node


def _escape(value: str) -> str:
    """In OmegaConf's grammar backslashes before `${` stand for half as many; an odd one escapes it."""
    return OPENING.sub(lambda opening: "\\" * (2 * len(opening[1]) + 1) + "${", value)


def _unescape(value: str) -> str:
    return OPENING.sub(lambda opening: "\\" * (len(opening[1]) // 2) + "${", value)


def _refuse_interpolation(value: str, path: Path) -> str:
    for opening in OPENING.finditer(value):
        if len(opening[1]) % 2 == 0:
            raise UserError(f"{path}: holds an interpolation, ${{...}}; a run's configuration has none left")
    return value
