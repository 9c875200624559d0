"""Where weights, their architecture and their tokenizer come from. Imports neither torch nor transformers."""

from posttrain.models.hf import HFModel

__all__ = ["HFModel"]
