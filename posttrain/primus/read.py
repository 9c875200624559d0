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
HEADER = ("framework", "modules")  # keys at the top that say what the file is


class Floats(yaml_file.Plain):
    """Reads 1e-4 as a number: YAML 1.1 requires 1.0e-4."""


Floats.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass
class Primus:
    """The content of a file.

    Attributes:
        path: the file.
        settings: key -> value, without sections; `dataset` alone is a mapping.
        where: key -> where it stands in the file, for messages.
        preset: what `model: NAME.yaml` names, without the suffix; None: nothing.
        variables: the environment variables that it names.
        of_preset: keys that so far only the preset's file sets.
        repeated: (where it stands, its value, where the one that is used stands) of settings that are there again with
            another value.
        ignored: modules that aren't post-training.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    variables: list[str] = field(default_factory=list)
    of_preset: set[str] = field(default_factory=set)
    repeated: list[tuple[str, Any, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def add(self, values: dict[str, Any], section: str) -> None:
        """Add the settings of a section; sections inside it only group them, but `peft` has short names of its own."""
        for key, value in values.items():
            location = f"{section}.{key}" if section else key
            if section.rpartition(".")[2] == "peft":
                key = PEFT.get(key, key)
            if isinstance(value, dict) and key != "dataset":
                self.add(value, location)
                continue
            before = self.settings.get(key)
            if before not in (None, value) and key not in self.of_preset:
                self.repeated.append((self.where[key], before, location))
            self.settings[key] = value
            self.where[key] = location
            self.of_preset.discard(key)


def read_primus(path: Path) -> Primus:
    """Read a file of either form: sections at the top, or `modules.post_trainer.overrides`.

    Raises:
        UserError: it can't be read, or is not a configuration of Primus for post-training with Megatron-Bridge.
    """
    primus = Primus(path)
    content = _read_mapping(path, primus.variables)
    for where, value in yaml_file.repetitions(path):
        primus.repeated.append((where, value, "the last one"))
    settings = {key: value for key, value in content.items() if key not in HEADER}
    if "modules" in content:
        _add_modules(content["modules"], primus)
        primus.add(settings, "")
    elif content.get("framework") in FRAMEWORKS:
        if content.get("task", "posttrain") != "posttrain":
            raise UserError(f"{path}: task={content['task']}: only posttrain can be imported")
        primus.add(settings, "")
    elif "post_train" in content:
        raise UserError(
            f"{path}: names a script with its own configuration; start from the recipe that the script uses: "
            "python -m posttrain recipe=list"
        )
    else:
        problem = "no `framework`, no `modules`"
        if "framework" in content:
            problem = f"framework={content['framework']}"
        raise UserError(f"{path}: {problem}; a Primus configuration with framework megatron_bridge was expected")
    return primus


def _add_modules(modules: object, primus: Primus) -> None:
    """The form with `modules`: the module that trains after pre-training, and what it overrides."""
    if not isinstance(modules, dict):
        raise UserError(f"{primus.path}: modules: a mapping was expected, got {modules}")
    module = modules.get("post_trainer")
    if not isinstance(module, dict):
        names = ", ".join(map(str, modules))
        raise UserError(f"{primus.path}: has no modules.post_trainer but {names}; only post-training can be imported")
    if module.get("framework") not in FRAMEWORKS:
        raise UserError(
            f"{primus.path}: modules.post_trainer.framework={module.get('framework')}: only megatron_bridge can be "
            "imported"
        )
    primus.ignored = [f"modules.{name}" for name in modules if name != "post_trainer"]
    model = module.get("model")
    if model:
        primus.preset = str(model).removesuffix(".yaml")
        if not re.fullmatch(r"\w[\w.-]*", primus.preset):  # beside the presets lie files that are nobody's business
            raise UserError(f"{primus.path}: modules.post_trainer.model={model}: must be the name of a preset's file")
        primus.add(_read_preset(primus), str(model))
        primus.of_preset = set(primus.settings)
    overrides = module.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{primus.path}: modules.post_trainer.overrides: a mapping was expected")
    own = {key: value for key, value in module.items() if key not in ("framework", "model", "overrides")}
    primus.add(own, "modules.post_trainer")
    primus.add(overrides, "modules.post_trainer.overrides")


def _read_preset(primus: Primus) -> dict[str, Any]:
    """The model's own file, where the configuration lies in a checkout of Primus."""
    for folder in primus.path.resolve().parents:
        file = folder / PRESETS / f"{primus.preset}.yaml"
        if file.is_file():
            return _read_mapping(file, primus.variables)
    return {}


def _read_mapping(path: Path, variables: list[str]) -> dict[str, Any]:
    """The mapping in `path`, its placeholders replaced; the variables that they name are added to `variables`."""
    content = yaml_file.parse(path, Floats)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a configuration of Primus: a mapping was expected")
    values = replace_placeholders(content, variables, path)
    try:
        secrets.check(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return values


def replace_placeholders(value: object, variables: list[str], path: Path) -> Any:
    """`value` with ${VARIABLE:default} replaced by the environment's value, else the default.

    A value that is nothing but a placeholder is read as YAML afterwards, so that ${STEPS:200} is a number.

    Args:
        value: as YAML gave it.
        variables: takes the name of each variable.
        path: of the file, for messages.

    Raises:
        UserError: a variable is not set and has no default, or holds a secret.
    """

    def replace(match: re.Match[str]) -> str:
        secrets.refuse_variable(match[1], f"{path}: ${{{match[1]}}}")
        text = os.environ.get(match[1], match[2])
        if text is None:
            raise UserError(f"{path}: requires the environment variable {match[1]}, which is not set")
        if match[1] not in variables:
            variables.append(match[1])
        return text

    if isinstance(value, dict):
        return {str(key): replace_placeholders(item, variables, path) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_placeholders(item, variables, path) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = PLACEHOLDER.sub(replace, value)
    if not PLACEHOLDER.fullmatch(value):
        return text
    try:
        return yaml_file.parse_text(text, f"{path}: {value[:80]}", Floats)
    except UserError:
        return text
