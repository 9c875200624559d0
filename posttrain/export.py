"""Hugging Face directories out of a live Megatron model."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch


def export_model(trainer: Any, model: list[torch.nn.Module]) -> Path:
    """Write RUN_DIR/adapter (PEFT) or RUN_DIR/hf (the whole model), tokenizer included; a collective call.

    The directory appears whole: it is written aside and renamed by the first rank.

    Returns:
        The directory.
    """
    final = trainer.run_dir / ("adapter" if trainer.peft else "hf")
    scratch = trainer.run_dir / f".{final.name}.partial"
    if trainer.rank == 0 and scratch.exists():
        shutil.rmtree(scratch)
    if trainer.peft:
        base = trainer.model.path if trainer.model.random_init else str(trainer.model.directory)
        trainer.bridge.save_hf_adapter(model, scratch, trainer.peft, base_model_name_or_path=base, show_progress=False)
    elif trainer.model.random_init:
        trainer.bridge.save_hf_weights(model, scratch, show_progress=False)
    else:
        trainer.bridge.save_hf_pretrained(model, scratch, show_progress=False)
    if trainer.rank == 0:
        trainer.tokenizer.save_pretrained(scratch)
        if final.exists():
            shutil.rmtree(final)
        os.replace(scratch, final)
    if trainer.world > 1:
        torch.distributed.barrier()
    return final
