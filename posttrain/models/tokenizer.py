"""The tokenizer of a configured model, for commands that need nothing else of it."""

import os
import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from posttrain.config.instantiate import built
from posttrain.errors import UserError
from posttrain.models.hf import HFModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(cfg: DictConfig) -> "PreTrainedTokenizerBase":
    """Load the model's tokenizer without torch, whose import takes longer than all the rest."""
    model: HFModel = built(cfg.model)
    if model.path is None and model.tokenizer is None:
        raise UserError("`model.path`: requires a folder with a tokenizer, or a hub id")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # one says that torch is missing
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it says of a config.json isn't the command's to say
    _ = model.tokenizer_path  # the demo model is converted here, with torch
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # to transformers it is not installed
    try:
        return model.load_tokenizer()
    finally:
        if hidden:
            del sys.modules["torch"]
