"""Activations by Hugging Face's names, the tanh approximations of GELU included."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu

from posttrain.errors import UserError

type Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": fast_gelu,
    "gelu_fast": fast_gelu,
    "gelu_pytorch_tanh": fast_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Activation:
    """Return the function.

    Raises:
        UserError: Megatron has no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
