"""Weights before training: random ones as well as those of a Hugging Face directory."""

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.patches.registry import Kind, patch, replace

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState
    from megatron.core.transformer.module import MegatronModule
    from transformers import PretrainedConfig

MARK = "posttrain.random_init"


def write_random_base(directory: Path, hf_config: "PretrainedConfig") -> Path:
    """Write a Hugging Face directory that stands for random weights: its config, and a safetensors file with no tensor.

    Megatron-Bridge wants a base checkpoint even where nothing is to be loaded.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    hf_config.save_pretrained(directory)
    save_file({}, directory / "model.safetensors", metadata={MARK: "true"})
    return directory


def is_random_base(directory: str) -> bool:
    """Whether `directory` was written by `write_random_base`."""
    from safetensors import safe_open

    path = Path(directory) / "model.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return MARK in (file.metadata() or {})


@patch(
    "random-base-weights",
    kind=Kind.CORRECTNESS,
    symptom="an adapter on random base weights is refused: PEFT requires a pretrained checkpoint path",
    versions={"megatron-bridge": ">=0.6,<0.7"},
)
def keep_random_base_weights() -> None:
    """Keep the initialisation where the base checkpoint is a random one; read others by the run's own bridge."""
    import torch
    from megatron.bridge.training import checkpointing

    plain = checkpointing._load_hf_pretrained_checkpoint

    def load(
        hf_dir: str,
        state: "GlobalState",
        model: "list[MegatronModule]",
        optimizer: object,
        *,
        skip_load_to_model_and_opt: bool,
    ) -> object:
        with torch.no_grad():
            if not (skip_load_to_model_and_opt or is_random_base(hf_dir)):
                # By the run's own bridge: its embedding may have more rows than the files.
                state.cfg.checkpoint.run.bridge.load_hf_weights(model)
            return plain(hf_dir, state, model, optimizer, skip_load_to_model_and_opt=True)

    replace(checkpointing, _load_hf_pretrained_checkpoint=load)
