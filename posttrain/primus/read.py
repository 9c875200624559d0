"""A Primus configuration file as one flat mapping of settings."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config import secrets, yaml_file
from posttrain.errors import UserError

FRAMEWORKS = ("megatron_bridge", "megatron-bridge")
PLACEHOLDER = re.compile(r"\$\{(\w+)(?::([^{}]*))?\}")
# Where a checkout of Primus keeps what `model: NAME.yaml` means.
PRESETS = "primus/configs/models/megatron_bridge"
PEFT = {"dim": "peft_dim", "alpha": "peft_alpha", "dropout": "peft_dropout", "target_modules": "lora_target_modules"}
HEADER = ("work_group", "user_name", "exp_name", "workspace", "framework", "task", "modules", "extends", "includes")


class Floats(yaml_file.Plain):
    """Reads 1e-4 as a number: YAML 1.1 wants 1.0e-4."""


Floats.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass
class Primus:
    """What a file says.

    Attributes:
        path: the file.
        settings: key -> value, without sections; `dataset` alone is a mapping.
        where: key -> where it stands in the file, for messages.
        preset: what `model: NAME.yaml` names, without the suffix; None: nothing.
        read: the environment variables that it names.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    read: list[str] = field(default_factory=list)

    def add(self, values: dict[str, Any], place: str) -> None:
        """Take over a section; sections inside it are only a way of writing, but `peft`'s words are short."""
        for key, value in values.items():
            here = f"{place}.{key}" if place else key
            if place.rpartition(".")[2] == "peft":
                key = PEFT.get(key, key)
            if isinstance(value, dict) and key != "dataset":
                self.add(value, here)
            else:
                self.settings[key], self.where[key] = value, here


def read(path: Path) -> Primus:
    """Read a file of either form: sections at the top, or `modules.post_trainer.overrides`.

    Raises:
        UserError: it can't be read, or is no configuration of Primus for post-training with Megatron-Bridge.
    """
    found: list[str] = []
    content = _mapping(path, found)
    primus = Primus(path, read=found)
    if "modules" in content:
        _modules(content["modules"], primus)
        primus.add({key: value for key, value in content.items() if key not in HEADER}, "")
    elif content.get("framework") in FRAMEWORKS:
        if content.get("task", "posttrain") != "posttrain":
            raise UserError(f"{path}: task={content['task']}: only posttrain can be taken over")
        primus.add({key: value for key, value in content.items() if key not in HEADER}, "")
    elif "post_train" in content:
        raise UserError(
            f"{path}: names a script with its own configuration; start from the recipe that the script uses: "
            "python -m posttrain recipe=list"
        )
    else:
        wrong = f"framework={content['framework']}" if "framework" in content else "no `framework`, no `modules`"
        raise UserError(f"{path}: {wrong}; a Primus configuration with framework megatron_bridge was expected")
    for key in {"extends", "includes"} & content.keys():
        primus.settings[key], primus.where[key] = content[key], key
    return primus


def _modules(modules: object, primus: Primus) -> None:
    """The form with `modules`: the module that trains after pre-training, and what it overrides."""
    module = modules.get("post_trainer") if isinstance(modules, dict) else None
    if not isinstance(module, dict):
        names = ", ".join(modules) if isinstance(modules, dict) else str(modules)
        raise UserError(f"{primus.path}: has no modules.post_trainer but {names}; only post-training can be taken over")
    if module.get("framework") not in FRAMEWORKS:
        raise UserError(
            f"{primus.path}: modules.post_trainer.framework={module.get('framework')}: only megatron_bridge can be "
            "taken over"
        )
    if model := module.get("model"):
        primus.preset = str(model).removesuffix(".yaml")
        if not re.fullmatch(r"\w[\w.-]*", primus.preset):  # beside the presets lie files that are nobody's business
            raise UserError(f"{primus.path}: modules.post_trainer.model={model}: must be the name of a preset's file")
        primus.add(_preset(primus), str(model))
    overrides = module.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{primus.path}: modules.post_trainer.overrides: a mapping was expected")
    primus.add(overrides, "modules.post_trainer.overrides")


def _preset(primus: Primus) -> dict[str, Any]:
    """The model's own file, where the configuration lies in a checkout of Primus."""
    for folder in primus.path.resolve().parents:
        file = folder / PRESETS / f"{primus.preset}.yaml"
        if file.is_file():
            return _mapping(file, primus.read)
    return {}


def _mapping(path: Path, found: list[str]) -> dict[str, Any]:
    """The mapping in `path`, its placeholders filled; the variables that they name are added to `found`."""
    content = yaml_file.parse(path, Floats)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no configuration of Primus: a mapping was expected")
    values = filled(content, found, path)
    try:
        secrets.check(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return values


def filled(value: Any, found: list[str], path: Path) -> Any:
    """`value` with ${VARIABLE:default} replaced by the environment's value, else the default.

    A value that is nothing but a placeholder is read as YAML afterwards, so that ${STEPS:200} is a number.

    Args:
        value: as YAML gave it.
        found: takes the name of each variable.
        path: of the file, for messages.

    Raises:
        UserError: a variable is not set and has no default, or holds a secret.
    """

    def one(match: re.Match[str]) -> str:
        secrets.refuse_variable(match[1], f"{path}: ${{{match[1]}}}")
        text = os.environ.get(match[1], match[2])
        if text is None:
            raise UserError(f"{path}: needs the environment variable {match[1]}, which is not set")
        if match[1] not in found:
            found.append(match[1])
        return text

    if isinstance(value, dict):
        return {str(key): filled(item, found, path) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, found, path) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = PLACEHOLDER.sub(one, value)
    if not PLACEHOLDER.fullmatch(value):
        return text
    try:
        return yaml_file.parse_text(text, f"{path}: {value[:80]}", Floats)
    except UserError:
        return text
