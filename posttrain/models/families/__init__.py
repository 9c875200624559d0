"""Every model family that is known: one file of this folder each, and what users' modules register.

Nothing else in the package names a family; what differs between them is asked of their records.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.models.families.family import ModelFamily
from posttrain.models.families.field_rules import rope_limit

SHARED = ("family", "field_rules")  # modules that the families are written with
_known: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> ModelFamily:
    """Make a family known; it replaces one of the same model_type.

    Returns:
        The same.
    """
    _known[family.model_type] = family
    return family


def families() -> tuple[ModelFamily, ...]:
    """All that are known."""
    return tuple(_known.values())


def family_of(config: Mapping[str, Any]) -> ModelFamily | None:
    """The family of a model: that of its model_type or, where it has none, of one of its architectures.

    Args:
        config: fields of its config.json.
    """
    kind = config.get("model_type")
    if kind is not None:
        return _known.get(str(kind))
    architectures = config.get("architectures")
    if not isinstance(architectures, Sequence):
        return None
    for architecture in architectures:
        family = family_with(architecture)
        if family is not None:
            return family
    return None


def family_with(architecture: str | None) -> ModelFamily | None:
    """The family with a class of this name."""
    for family in families():
        if architecture in family.architectures:
            return family
    return None


def possible_families(config: Mapping[str, Any]) -> tuple[ModelFamily, ...]:
    """The family of a model or, if that isn't known, all: for what is better guessed than left out.

    Args:
        config: fields of its config.json.
    """
    family = family_of(config)
    if family is None:
        return families()
    return (family,)


def experts_of(config: Mapping[str, Any]) -> int:
    """Experts of a layer of a model with this config.json, 0 in a dense one."""
    return int(_first_value("experts", config) or 0)


def softcap_of(config: Mapping[str, Any]) -> float | None:
    """What a model with this config.json squashes its output logits to; None: nothing."""
    softcap: float | None = _first_value("softcap", config)
    return softcap


def score_softcap_of(config: Mapping[str, Any]) -> float | None:
    """What a model with this config.json squashes its attention scores to; None: nothing."""
    softcap: float | None = _first_value("score_softcap", config)
    return softcap


def head_width_of(config: Mapping[str, Any]) -> int | None:
    """Features of an attention head of a model with this config.json; None: a size is missing, or it isn't known."""
    family = family_of(config)
    if family is None:
        return None
    try:
        sizes = family.dimensions(config)
    except ValueError:
        return None
    return sizes.query // sizes.heads


def learned_positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions a model with this config.json has embeddings for; None: it has none, or isn't known."""
    family = family_of(config)
    if family is None:
        return None
    positions: int | None = family.value("learned_positions", config)
    return positions


def position_limit_of(config: Mapping[str, Any]) -> int | None:
    """The longest sequence, in tokens, that a model with this config.json can be trained on; None: any, or not known.

    It has embeddings for so many positions, or a rotary embedding whose frequencies depend on the sequence's length
    beyond: packed sequences of several lengths share one set of frequencies.
    """
    family = family_of(config)
    if family is None:
        return None
    return family.value("learned_positions", config) or rope_limit(config)


def _first_value(size: str, config: Mapping[str, Any]) -> Any:
    known = family_of(config)
    if known is not None:
        return known.value(size, config)
    for family in families():
        value = family.given(size, config)
        if value:
            return value
    return None


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        if module.name not in SHARED:
            register(importlib.import_module(f"{__name__}.{module.name}").FAMILY)


_discover()
