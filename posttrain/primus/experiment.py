"""A translated configuration as a file of conf/experiment, and as overrides."""

import shlex

from omegaconf import OmegaConf

from posttrain.config.overrides import format_override
from posttrain.primus.read import Primus
from posttrain.primus.translate import Translation
from posttrain.utils.escape import escape_control


def format_file(primus: Primus, translation: Translation) -> str:
    """The file: an experiment that chooses the groups and sets the values."""
    lines = [
        "# @package _global_",
        f"# From {escape_control(primus.path.name)}, a configuration of Primus for Megatron-Bridge.",
    ]
    if primus.variables:
        variables = ", ".join(primus.variables)
        lines.append(f"# Read with these environment variables, or their defaults: {variables}")
    if translation.left_out:
        lines.append("# No counterpart:")
        for line in translation.left_out:
            lines.append(f"#   {' '.join(line.split())}")
    defaults = [{f"override /{group}": name} for group, name in translation.choices.items()]
    body = OmegaConf.create()
    for key, value in translation.values.items():
        OmegaConf.update(body, key, value, force_add=True)
    content = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults}))
    if translation.values:
        content += OmegaConf.to_yaml(body)
    return "\n".join(lines) + "\n" + content


def format_overrides(translation: Translation) -> list[str]:
    """The same without a file."""
    overrides = []
    for group, name in translation.choices.items():
        overrides.append(format_override(group, name))
    for key, value in translation.values.items():
        overrides.append(format_override(key, value))
    return overrides


def format_command(arguments: list[str]) -> str:
    """A command line for a shell."""
    return shlex.join(["python", "-m", "posttrain", *arguments])
