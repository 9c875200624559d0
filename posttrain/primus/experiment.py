"""A translated configuration as a file of conf/experiment, and as words."""

import shlex
from typing import Any

from omegaconf import OmegaConf

from posttrain.primus.read import Primus
from posttrain.primus.translate import Translation
from posttrain.words import word


def text(primus: Primus, done: Translation) -> str:
    """The file: an experiment that chooses the groups and sets the values."""
    body = OmegaConf.create()
    for key, value in done.values.items():
        OmegaConf.update(body, key, value, force_add=True)
    defaults: list[Any] = [{f"override /{group}": name} for group, name in done.choices.items()]
    content = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults}))
    lines = ["# @package _global_", f"# From {primus.path.name}, a configuration of Primus for Megatron-Bridge."]
    if primus.read:
        lines.append(f"# Environment variables, or their defaults, that it was read with: {', '.join(primus.read)}")
    if done.left_out:
        lines += ["# Not taken over:", *(f"#   {' '.join(line.split())}" for line in done.left_out)]
    return "\n".join(lines) + "\n" + content + (OmegaConf.to_yaml(body) if len(body) else "")


def words(done: Translation) -> list[str]:
    """The same without a file."""
    chosen = [word(group, name) for group, name in done.choices.items()]
    values = [("+" if key.startswith("trainer.megatron.") else "") + word(key, v) for key, v in done.values.items()]
    return [*chosen, *values]


def command(*arguments: str) -> str:
    """A command line for a shell."""
    return shlex.join(["python", "-m", "posttrain", *arguments])
