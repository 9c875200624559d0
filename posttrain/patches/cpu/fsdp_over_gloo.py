"""Megatron-FSDP over gloo. A CPU's memory needs it for tests alone, which see there what GPUs do."""

from types import ModuleType
from typing import TYPE_CHECKING

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, on_cpu, patch, replace

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor

SOURCE = "megatron.core.distributed.fsdp"


def _name_device(module: ModuleType) -> None:
    """Have the wrapper make its device's name of a number; what is placed there is placed on the CPU."""
    import torch

    wrapper = module.FullyShardedDataParallel
    build = wrapper.__init__

    def built(self: object, *args: object, **kwargs: object) -> None:
        current = torch.cuda.current_device
        replace(torch.cuda, current_device=lambda: 0)
        try:
            build(self, *args, **kwargs)
        finally:
            replace(torch.cuda, current_device=current)

    replace(wrapper, __init__=built)


def _gather_unequal(module: ModuleType) -> None:
    """Have a whole tensor be the sum of parts that are zero elsewhere: gloo gathers parts of one size alone."""
    import torch
    from torch.distributed.tensor import Shard

    def gathered(tensor: "DTensor") -> "torch.Tensor":
        whole = torch.zeros(tensor.shape, dtype=tensor.dtype)
        chunk = module.gather_and_compute_chunk_metadata(tensor)
        place = [slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        whole[tuple(place)] = tensor.to_local()
        for dimension, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                torch.distributed.all_reduce(whole, group=tensor.device_mesh.get_group(dimension))
        return whole

    replace(module, uneven_dtensor_to_full_tensor=gathered)


@patch(
    "cpu-megatron-fsdp",
    kind=Kind.CPU,
    symptom="Megatron-FSDP asks for a device by the name 'cuda:cpu', and gathers parts of different sizes",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=on_cpu,
)
def run_megatron_fsdp() -> None:
    """Let it run."""
    on_import(f"{SOURCE}.mcore_fsdp_adapter", _name_device)
    on_import(f"{SOURCE}.src.megatron_fsdp.uneven_dtensor", _gather_unequal)
