"""A run as a file: `python -m posttrain my.yaml` stands for the overrides that the file has as YAML.

    model: llama3_8b             # a group and its choice, or
    peft: lora
    data: alpaca
    data.path: my.json           # a key by its path, or
    trainer:                     # keys below their group
      epochs: 2

The file may lie anywhere and needs no directive of Hydra's. What else is on the command line comes on top. It may be
anybody's, so it has a file's rights, not the command line's.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from posttrain.config import policy, yaml_file
from posttrain.config.containers import as_dict
from posttrain.config.overrides import format_override
from posttrain.errors import UserError
from posttrain.utils.user_paths import expand_home

ENDINGS = (".yaml", ".yml")
TAKE_A_VALUE = re.compile(r"-(cn|cd|cp|c|p|i|-config-\w+|-cfg|-package|-info|-rerun|-resume)")
JOB_NAME = "hydra.job.name"  # as which .hydra/hydra.yaml records the file's name
PLAIN_KEY = re.compile(r"[\w/@-]+(\.[\w@-]+)*")

_files: dict[str, Path] = {}  # keys that a file has set in this command


def expand(arguments: list[str]) -> list[str]:
    """A command line with the name of a YAML file replaced by the overrides in it, those left out that are given anew.

    Raises:
        UserError: there is no such file, it can't be read, or it sets what is not a file's to set.
    """
    names = _named(arguments)
    if not names:
        return arguments
    if len(names) > 1:
        raise UserError(f"{names[0]} and {names[1]}: one file at a time")
    path = expand_home(names[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    others = [argument for argument in arguments if argument != names[0]]
    given = {_key(argument) for argument in others if "=" in argument and not argument.startswith("-")}
    kept = []
    _files.clear()
    for key, override in overrides_of(path):
        if key.replace("/", ".") in given:
            continue
        rule = policy.rule_of_override(OverridesParser.create().parse_override(override))
        if rule is not None:
            raise UserError(
                f"{path}: `{key}`: {rule.why}; it is taken from the command line, and from no file: give it there"
            )
        _files[key] = path
        kept.append(override)
    return [*kept, format_override(JOB_NAME, str(path)), *others]


def overrides_of(path: Path) -> Iterator[tuple[str, str]]:
    """(key or group, override) of everything that a run's file sets."""
    cfg = yaml_file.read(path)
    if "defaults" in cfg:
        raise UserError(
            f"{path}: `defaults`: is Hydra's list of files; a run's file chooses a group by `group: choice`. A file "
            "with such a list lies in DIR/experiment/ and is chosen with --config-dir DIR experiment=NAME"
        )
    yield from _flat(as_dict(cfg, resolve=False), "", path)


def located(message: str) -> str:
    """An error message with the file in front that has set the key which it is about, if one has."""
    quoted = re.match(r"`([^`=]+)", message)
    if quoted is None or quoted[1] not in _files:
        return message
    return f"{_files[quoted[1]]}: {message}"


def _named(arguments: list[str]) -> list[str]:
    """The arguments that are names of YAML files."""
    names = []
    before = ""
    for argument in arguments:
        is_value = TAKE_A_VALUE.fullmatch(before)
        before = argument
        if argument.endswith(ENDINGS) and "=" not in argument and not argument.startswith("-") and not is_value:
            names.append(argument)
    return names


def _flat(values: dict[str, Any], above: str, path: Path) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        key = f"{above}{name}"
        if not PLAIN_KEY.fullmatch(key):
            raise UserError(f"{path}: `{key}`: is no name of a key")
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.", path)
        else:
            yield key, format_override(key, value)


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0].replace("/", ".")
