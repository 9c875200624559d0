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

from posttrain.models.whole_parameters import own_slice
from posttrain.ops.fp8_linear import EightBitWeight, quantise

type Fill = Callable[[list[torch.nn.Module]], object]


def wrappers_of(parts: list[torch.nn.Module]) -> list[MegatronFSDP]:
    """Megatron-FSDP's wrapper of each chunk of this process; empty where the model is not divided in this way."""
    wrappers = []
    for part in parts:
        wrappers += [module for module in part.modules() if isinstance(module, MegatronFSDP)]
    return wrappers


def shards_of(parts: list[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str, DTensor]]:
    """Each divided parameter that is in its place: its module, its name there, this process's row of numbers."""
    for wrapper in wrappers_of(parts):
        for module in wrapper.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    yield module, name, parameter


def computed_with(shard: DTensor) -> torch.nn.Parameter:
    """The whole parameter of the forward pass, empty outside of it, of which `shard` is a part."""
    parameter: torch.nn.Parameter = getattr(shard, "orig_param")  # noqa: B009  (no attribute of the class)
    return parameter


def is_in_eight_bits(parameter: torch.Tensor) -> bool:
    """Whether it is a frozen matrix in 8 bits, divided or not."""
    if isinstance(parameter, DTensor):
        parameter = computed_with(parameter)
    return isinstance(parameter, EightBitWeight)


def fill(load: Fill, parts: list[torch.nn.Module]) -> None:
    """Have `load` fill the model, wrapped or not; then the weights of its forward pass are those of the optimizer's.

    Megatron-Bridge's own call for that is to the wrong wrapper where a run loads its base.

    Args:
        load: fills the plain model's parameters in place; of a DTensor, this process's row of numbers.
        parts: the model's chunks of this process.
    """
    with quantised_as_read(parts):
        load(unwrap_model(parts))
    round_shards(parts)
    follow_shards(parts)


@torch.no_grad()
def filled(load: Fill, parts: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """As `fill`, after the model is divided; for Megatron-Bridge's hooks, which give it back."""
    fill(load, parts)
    return parts


class DividedEightBitWeight(torch.nn.Parameter):
    """Stands for a divided matrix [out, in] in 8 bits while it is filled, and takes no memory.

    What is copied into it is quantised by rows as a whole, since each process has all scales; this process keeps its
    own numbers.
    """

    shard: DTensor

    @classmethod
    def in_place_of(cls, shard: DTensor) -> "DividedEightBitWeight":
        """For the shard [.., in / 2] of pairs; see EightBitWeight."""
        rows, pairs = shard.shape
        stand_in = cls(torch.zeros(1, 1, dtype=shard.dtype, device=shard.device).expand(rows, 2 * pairs), False)
        stand_in.shard = shard
        return stand_in

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "DividedEightBitWeight":
        """Quantise `source` [out, in], and keep what is this process's."""
        eight, scale = quantise(source.detach().to(self.device))
        pairs = eight.view(torch.bfloat16).view(-1)[own_slice(self.shard)]
        self.shard.to_local().view(-1).copy_(pairs)
        whole = computed_with(self.shard)
        assert isinstance(whole, EightBitWeight)
        whole.scale.copy_(scale)
        return self


@contextmanager
def quantised_as_read(parts: list[torch.nn.Module]) -> Iterator[None]:
    """While it lasts, the divided matrices in 8 bits take what is copied into them in the model's number format."""
    shards = [found for found in shards_of(parts) if is_in_eight_bits(found[2])]
    for module, name, shard in shards:
        setattr(module, name, DividedEightBitWeight.in_place_of(shard))
    try:
        yield
    finally:
        for module, name, shard in shards:
            setattr(module, name, shard)


@torch.no_grad()
def round_shards(parts: list[torch.nn.Module]) -> None:
    """Round the optimizer's fp32 shards to the precision of the forward pass, where other layouts copy theirs from.

    Files in fp32, and random weights, have more digits. A bf16 weight of 0.02 changes after some steps of 1e-5 from a
    rounded start; from between two values many do in the first step, and the run is another.
    """
    for _, _, parameter in shards_of(parts):
        shard = parameter.to_local()
        shard.copy_(shard.to(computed_with(parameter).dtype))


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
    shards = [found for found in shards_of(parts) if found[2].requires_grad]
    for module, name, shard in shards:
        with torch.no_grad():
            whole = uneven_dtensor_to_full_tensor(shard).to(dtype)
        setattr(module, name, torch.nn.Parameter(whole, requires_grad=False))
    try:
        yield
    finally:
        for module, name, shard in shards:
            setattr(module, name, shard)
