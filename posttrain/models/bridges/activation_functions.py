"""Megatron's activations by Hugging Face's names; those that the families' rules accept."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu

type Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": fast_gelu,
    "gelu_fast": fast_gelu,
    "gelu_accurate": fast_gelu,
    "gelu_pytorch_tanh": fast_gelu,
    "gelu_python_tanh": fast_gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
    "sigmoid": F.sigmoid,
    "tanh": torch.tanh,
}
