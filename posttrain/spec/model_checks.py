"""What a model's files, its config.json and its adapter say against the configuration, before anything is loaded."""

import sys
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import DictConfig

from posttrain.checkpoint import directories
from posttrain.config.instantiate import built
from posttrain.errors import UserError
from posttrain.models.config_checks import check_config
from posttrain.models.families import experts_of, possible_families
from posttrain.models.headers import read_json
from posttrain.models.hf import check_trust, plain
from posttrain.models.hf_adapter import is_adapter, read_adapter
from posttrain.peft import adapter_checks
from posttrain.peft.adapters import resolve
from posttrain.utils import kernel_files
from posttrain.utils.user_paths import expand_home

SIZES = ("layers", "heads", "groups", "experts", "learned_positions")  # fields of a config.json that are computed with


def check_model(cfg: DictConfig) -> None:
    """A local model directory must be one; a hub id must look like one."""
    path = cfg.model.path
    if cfg.model.trust_remote_code:
        check_trust(path)
        print(
            f"posttrain: model.trust_remote_code=true: Python code from {path} runs with your rights", file=sys.stderr
        )
    if path is None:
        raise UserError("`model.path`: give a Hugging Face directory or a hub id, e.g. model.path=./my-model")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and ":" not in path and not expand_home(path).is_dir():
        raise UserError(f"`model.path={path}`: there is no such directory")
    check_no_run(expand_home(path))
    for key, place in (("model.path", path), ("model.tokenizer", cfg.model.tokenizer)):
        if place is not None:
            kernel_files.refuse(expand_home(place), key)
    built(cfg.model)  # importing a user's own class makes its family known


def check_no_run(path: Path) -> None:
    """Refuse the directory of a run where a model's is asked for, with the one that is meant."""
    if (path / "config.json").is_file() or is_adapter(path):
        return
    for export in (path / "hf", path / "adapter"):
        if (export / "config.json").is_file() or is_adapter(export):
            raise UserError(f"`model.path={path}`: is the directory of a run; its result is model.path={export}")
    if directories.holds_checkpoints(path):
        raise UserError(
            f"`model.path={path}`: has Megatron checkpoints, and training starts from Hugging Face's form: "
            f"python -m posttrain.convert export {quote(str(path))} DIR, then model.path=DIR. To continue a run: "
            "python -m posttrain --resume RUN"
        )


def check_peft(cfg: DictConfig, shape: Mapping[str, Any] | None) -> None:
    """What is trained goes with the model, of which `shape` is the architecture."""
    path = cfg.model.path
    if str(cfg.peft._target_).endswith("DoRA") and experts_of(shape or {}):
        _, names = resolve(cfg.peft.target_modules)
        if any(name.endswith(("linear_fc1", "linear_fc2")) for name in names):
            raise UserError(
                "`peft=dora`: of experts PEFT knows LoRA alone, and could not load the result; add "
                "peft.target_modules=[linear_qkv,linear_proj], or choose peft=lora"
            )
    if is_adapter(Path(path)):
        if cfg.peft._target_ is None:
            raise UserError(f"`model.path={path}`: is an adapter; choose peft=lora, or merge it first")
        adapter_checks.check(read_adapter(Path(path)), built(cfg.peft), Path(path))


def architecture(model: DictConfig) -> Mapping[str, Any] | None:
    """config.json fields of the config group `model`: those of a local directory, else as configured; None: unknown.

    Raises:
        UserError: one that a check computes with is not a size.
    """
    config = expand_home(model.path or "") / "config.json"
    if config.is_file() and not (model.random_init and model.architecture is not None):
        shape = read_json(config)
        check_config(shape, f"{config}: ")
        _check_sizes(shape, f"{config}: ")
        return shape
    configured: object = model.architecture
    if configured is None:
        return None
    if not isinstance(configured, DictConfig):
        raise UserError(f"`model.architecture={configured}`: must be a mapping, the fields of a config.json")
    shape = {str(name): value for name, value in configured.items()}
    check_config(plain(shape), "model.architecture.")
    _check_sizes(shape, "model.architecture.")
    return shape


def _check_sizes(shape: Mapping[str, Any], source: str) -> None:
    """Fields that are computed with are numbers; `source` begins the error."""
    for family in possible_families(shape):
        for size in SIZES:
            for name in getattr(family.fields, size):
                value = shape.get(name)
                whole = type(value) is int and value >= 0
                if value is not None and not whole:
                    raise UserError(f"{source}{name}={value}: must be a positive whole number")
