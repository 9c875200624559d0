"""The vocabulary is filled up to equal parts whose size suits a GPU's products; what is added must not count as tokens.

With rows or columns of an odd number a product of the output layer takes six times as long on an H200 (a vocabulary of
128,257 beside 128,256), and one added token makes a vocabulary odd.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from posttrain.models.vocabulary import is_vocabulary

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge

SUITABLE = 8  # 16-bit numbers that a product reads at once
STEP = 16  # of vocabularies that are not suitable

type WithBias = tuple[torch.Tensor, torch.Tensor | None]


def padded_rows(vocabulary: int, tensor: int) -> int:
    """Rows of the embedding where `tensor` processes, the tensor-parallel size, hold equal parts of it.

    Computed here: what upstream pads a size that it takes from its placeholder of a tokenizer can be a row short.
    """
    part = math.ceil(vocabulary / tensor)
    if part % SUITABLE:
        part = math.ceil(part / STEP) * STEP
    return part * tensor


def fill_up_as_read(bridge: "AutoBridge", rows: int) -> None:
    """Have the files' embedding and output matrices filled up with zeros, as upstream does for several processes.

    Args:
        bridge: to a directory of files.
        rows: of the model's matrices.
    """
    source = bridge.hf_pretrained.state.source
    load = source.load_tensors

    def load_filled_up(names: list[str]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load(names)
        for name in filter(is_vocabulary, tensors):
            tensor = tensors[name]
            tensors[name] = torch.cat([tensor, tensor.new_zeros(rows - tensor.size(0), *tensor.shape[1:])])
        return tensors

    source.load_tensors = load_filled_up


def hide_padding(parts: list[MegatronModule], vocabulary: int) -> None:
    """Give the logits beyond `vocabulary` the lowest value, so that they take no part in the softmax.

    Their rows are zeros, and a logit of 0 is the largest where the model's own are negative, as GPT-2's are.

    Args:
        parts: the model's chunks of this process, not wrapped.
        vocabulary: tokens that there are.
    """
    for part in parts:
        for module in part.modules():
            if getattr(module, "output_layer", None) is not None and hasattr(module, "vocab_size"):
                rows = module.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
                first = rows * parallel_state.get_tensor_model_parallel_rank()
                own = min(rows, max(0, vocabulary - first))
                module.output_layer.own_tokens = own  # for code that uses its weight alone
                module.output_layer.register_forward_hook(_mask_rows(rows, own, vocabulary))


def _mask_rows(rows: int, own: int, vocabulary: int) -> Callable[[torch.nn.Module, object, WithBias], WithBias]:
    """A forward hook of an output layer with `rows` rows here, of which `own` are tokens."""

    def hide(layer: torch.nn.Module, inputs: object, output: WithBias) -> WithBias:
        logits, bias = output
        used = own if logits.size(-1) == rows else vocabulary  # gathered from all processes
        if used >= logits.size(-1):
            return output
        padding = torch.arange(logits.size(-1), device=logits.device) >= used
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias

    return hide
