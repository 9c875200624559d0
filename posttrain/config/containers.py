"""Configurations as Python's own dictionaries."""

from typing import Any

from omegaconf import DictConfig, OmegaConf


def as_dict(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """The values of `cfg`, at any depth; with `resolve` interpolations are replaced by what they stand for."""
    values = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
