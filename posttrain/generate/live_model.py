"""The model of a Hugging Face directory, ready to answer."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.families import score_softcap_of
from posttrain.models.headers import own_file, read_optional_json
from posttrain.models.hf_adapter import read_adapter
from posttrain.peft.attach import attach_adapter
from posttrain.utils.gpus import visible_gpus

GENERATION = "generation_config.json"
# Of its fields: what is honoured, what can't change an answer here, and what is off at 1.
HONOURED = {"eos_token_id"}
WITHOUT_EFFECT = {"bos_token_id", "pad_token_id", "use_cache", "transformers_version", "_from_model_config"}
OFF_AT_ONE = {
    "encoder_repetition_penalty",
    "length_penalty",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "temperature",
    "top_p",
    "typical_p",
}


def usable_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if visible_gpus() and torch.cuda.is_available() else "cpu"


def load_model(
    directory: Path, dtype: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of an export, on the GPU if there is one.

    Of the model's generation_config.json only the tokens that end an answer are left; what else would have changed
    answers is named on stderr.

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
    holder = base
    if source.adapter and own_file(directory / GENERATION):
        holder = directory
    fields = read_optional_json(holder / GENERATION)
    ignored = unapplied(fields)
    if ignored:
        print(f"posttrain: not applied, of {holder / GENERATION}: {', '.join(ignored)}", file=sys.stderr, flush=True)
    config = source.hf_config()
    ends = fields.get("eos_token_id", config.eos_token_id)
    attention = None
    if score_softcap_of(config.to_dict()) is not None:
        attention = "eager"  # the only one that has the cap: transformers' usual one leaves it out in silence
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, dtype or usual),
            generation_config=GenerationConfig(eos_token_id=ends),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # of whatever kind: a stranger's files
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{directory}: transformers can't read it: {reason}") from error
    if source.adapter:
        model = attach_adapter(model, directory)
    return model.to(device).eval(), source.load_tokenizer()


def unapplied(fields: Mapping[str, object]) -> list[str]:
    """Fields of a generation_config.json that would change answers and don't, as `name=value`."""
    found = []
    for name, value in fields.items():
        off = not value or (value == 1 and name in OFF_AT_ONE)
        if not off and name not in HONOURED | WITHOUT_EFFECT:
            found.append(f"{name}={str(value)[:40]}")
    return found
