"""Weights before training: read by the run's own bridge, or random."""

from typing import TYPE_CHECKING

from posttrain.patches.registry import Kind, patch, replace

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState
    from megatron.core.transformer.module import MegatronModule


@patch(
    "base-weights",
    kind=Kind.CORRECTNESS,
    symptom="an adapter on random base weights is refused: PEFT requires a pretrained checkpoint path",
    versions={"megatron-bridge": ">=0.6,<0.7"},
)
def load_base_weights() -> None:
    """Have the run itself fill the model: its embedding may have more rows than the files, or there are no files."""
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
            if not skip_load_to_model_and_opt:
                state.cfg.checkpoint.run.load_base(model)
            return plain(hf_dir, state, model, optimizer, skip_load_to_model_and_opt=True)

    replace(checkpointing, _load_hf_pretrained_checkpoint=load)
