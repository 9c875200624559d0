"""A model under Megatron-FSDP (ZeRO stage 3): each process holds a row of numbers of every parameter, as DTensors.

A forward pass puts whole parameters in their place, layer by layer, and leaves those of a layer empty after it; so what
reads parameters elsewhere puts the shards back first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import uneven_dtensor_to_full_tensor
from torch.distributed.tensor import DTensor

type Fill = Callable[[list[torch.nn.Module]], object]


def wrappers_of(parts: list[torch.nn.Module]) -> list[MegatronFSDP]:
    """Megatron-FSDP's wrapper of each chunk of this process; empty where the model is not divided in this way."""
    wrappers = []
    for part in parts:
        wrappers += [module for module in part.modules() if isinstance(module, MegatronFSDP)]
    return wrappers


def fill(load: Fill, parts: list[torch.nn.Module]) -> None:
    """Have `load` fill the model, wrapped or not; then the weights of its forward pass are those of the optimizer's.

    Megatron-Bridge's own call for that is to the wrong wrapper where a run loads its base.

    Args:
        load: fills the plain model's parameters in place; of a DTensor, this process's row of numbers.
        parts: the model's chunks of this process.
    """
    load(unwrap_model(parts))
    round_shards(parts)
    follow_shards(parts)


@torch.no_grad()
def round_shards(parts: list[torch.nn.Module]) -> None:
    """Round the optimizer's fp32 shards to the precision of the forward pass, where other layouts copy theirs from.

    Files in fp32, and random weights, have more digits. A bf16 weight of 0.02 changes after some steps of 1e-5 from a
    rounded start; from between two values many do in the first step, and the run is another.
    """
    for wrapper in wrappers_of(parts):
        for parameter in wrapper.parameters():
            if isinstance(parameter, DTensor):
                shard = parameter.to_local()
                computed: torch.Tensor = getattr(parameter, "orig_param")  # noqa: B009  (no attribute of the class)
                shard.copy_(shard.to(computed.dtype))


def follow_shards(parts: list[torch.nn.Module]) -> None:
    """Let the weights of the forward pass be those of the shards, which the optimizer has in fp32."""
    for wrapper in wrappers_of(parts):
        wrapper.install_optimized_model_weights()


def put_shards_back(parts: list[torch.nn.Module]) -> None:
    """Let the modules' parameters be the shards, as after an optimizer step, not what the last forward pass left."""
    for wrapper in wrappers_of(parts):
        wrapper.synchronize_param_gather()


@contextmanager
def whole_trained(parts: list[torch.nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Whole trained parameters, of an adapter say, in the modules for as long as it lasts; a collective call.

    Args:
        parts: the model's chunks of this process.
        dtype: of the forward pass; the optimizer's shards are fp32.
    """
    put_shards_back(parts)
    shards: list[tuple[torch.nn.Module, str, DTensor]] = []
    for wrapper in wrappers_of(parts):
        for module in wrapper.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor) and parameter.requires_grad:
                    shards.append((module, name, parameter))
    for module, name, shard in shards:
        with torch.no_grad():
            whole = uneven_dtensor_to_full_tensor(shard).to(dtype)
        setattr(module, name, torch.nn.Parameter(whole, requires_grad=False))
    try:
        yield
    finally:
        for module, name, shard in shards:
            setattr(module, name, shard)
