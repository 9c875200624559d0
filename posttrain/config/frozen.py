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
    return OmegaConf.to_yaml(literal(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)))


def literal(values: dict[str, Any]) -> DictConfig:
    """A configuration of `values` as they are: `${...}` in a text is text."""
    return OmegaConf.create(_changed(values, _escaped))


def read(run_dir: Path, name: str = "config.yaml") -> DictConfig:
    """The configuration in the file `name` of a run directory or checkpoint, which `text` wrote.

    Raises:
        UserError: see `yaml_file.read_in`; or it holds an interpolation.
    """
    secrets.register()
    cfg = yaml_file.read_in(run_dir, name)
    _changed(OmegaConf.to_container(cfg, resolve=False), lambda value: _refuse_interpolation(value, run_dir / name))
    return cfg


def unescaped(values: Any) -> Any:
    """What plain YAML made of a file that `text` wrote, as the values that were written."""
    return _changed(values, lambda value: OPENING.sub(lambda found: "\\" * (len(found[1]) // 2) + "${", value))


def _escaped(value: str) -> str:
    """In OmegaConf's grammar backslashes before `${` stand for half as many; an odd one escapes it."""
    return OPENING.sub(lambda found: "\\" * (2 * len(found[1]) + 1) + "${", value)


def _refuse_interpolation(value: str, path: Path) -> str:
    if any(len(found[1]) % 2 == 0 for found in OPENING.finditer(value)):
        raise UserError(f"{path}: holds an interpolation, ${{...}}; a run's configuration has none left")
    return value


def _changed(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, dict):
        return {key: _changed(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_changed(value, change) for value in node]
    return node
