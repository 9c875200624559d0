"""The model of a Hugging Face directory, ready to answer."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.headers import own_file
from posttrain.models.hf_adapter import read_adapter
from posttrain.peft.attach import attach_adapter
from posttrain.utils.gpus import visible_gpus


def usable_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if visible_gpus() and torch.cuda.is_available() else "cpu"


def load_model(
    directory: Path, dtype: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of an export, on the GPU if there is one.

    Args:
        directory: as posttrain.generate.load.open_export gives it.
        dtype: float32 or bfloat16. None: bfloat16 on a GPU, float32 on a CPU.
    """
    device = usable_device()
    usual = "bfloat16" if device == "cuda" else "float32"
    logging.disable_progress_bar()
    source = HFModel(path=str(directory))
    if source.adapter:
        read_adapter(directory)  # before the base's weights are read
    base = source.directory
    has_own_generation = bool(source.adapter) and own_file(directory / "generation_config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype or usual), use_safetensors=True, trust_remote_code=False
        )
        if has_own_generation:
            model.generation_config = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # of whatever kind: a stranger's files
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{directory}: transformers can't read it: {reason}") from error
    if source.adapter:
        model = attach_adapter(model, directory)
    return model.to(device).eval(), source.load_tokenizer()
