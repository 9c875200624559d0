"""A default that is written in conf/, in the schema and in a class is the same in all of them."""

import importlib
from dataclasses import MISSING, fields, is_dataclass

import pytest
from omegaconf import MISSING as REQUIRED
from omegaconf import OmegaConf

from posttrain.config import schema
from posttrain.config.composition import CONF_DIR

# The file of each group that holds the defaults. Model, optimizer and scheduler have none: each file is a choice.
FILES = {
    "peft": "lora",
    "objective": "text",
    "data": "base/options",
    "parallelism": "ddp",
    "trainer": "default",
    "precision": "auto",
    "checkpoint": "default",
}
IN_CONFIG = ("launch", "run", "sweep", "recipe")


def written(group):
    """The values of a group's file, unresolved."""
    if group in IN_CONFIG:
        return OmegaConf.to_container(OmegaConf.load(CONF_DIR / "config.yaml")[group])
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / group / f"{FILES[group]}.yaml"))
    own = values.get(group)
    return own if isinstance(own, dict) else values


def classes(group, values):
    """The schema of a group, and the class that it is built into."""
    found = [item.type for item in fields(schema.Config) if item.name == group]
    module, _, name = str(values.get("_target_", "")).rpartition(".")
    if module.startswith("posttrain") and group != "trainer":  # the trainer takes its schema
        found.append(getattr(importlib.import_module(module), name))
    return [one for one in found if is_dataclass(one)]


@pytest.mark.parametrize("group", [*FILES, *IN_CONFIG])
def test_a_default_is_the_same_everywhere(group):
    values = written(group)
    compared = 0
    for cls in classes(group, values):
        for item in fields(cls):
            value = values.get(item.name, MISSING)
            said = item.default is not MISSING and item.default != REQUIRED
            if value is MISSING or not said or item.name == "_target_" or "${" in str(value):
                continue
            assert value == item.default, f"{cls.__name__}.{item.name}"
            compared += 1
    assert compared
