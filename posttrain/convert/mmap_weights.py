"""Weights in a mapped file instead of the process's memory: the kernel holds as much of it as there is room for."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

from posttrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem


def move_to_disk(parts: list[torch.nn.Module], directory: Path) -> list[torch.nn.Module]:
    """Return `parts` with parameters in a file without a name in `directory`, gone with the process; values are lost.

    Raises:
        UserError: the disk has no room for it.
    """
    by_id: dict[int, torch.nn.Parameter] = {}  # a tied one is there twice
    for part in parts:
        by_id |= {id(parameter): parameter for parameter in part.parameters()}
    parameters = sorted(by_id.values(), key=lambda parameter: -parameter.element_size())  # so that all are aligned
    size = sum(parameter.nbytes for parameter in parameters)
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would kill the process
        except OSError as error:
            raise UserError(f"convert.out: {size / 1e9:.1f} GB are needed in {directory} meanwhile: {error}") from error
        storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, nbytes=size)
    start = 0
    for p in parameters:
        end = start + p.nbytes
        p.data = torch.empty(0, dtype=p.dtype).set_(storage[start:end], 0, p.shape, p.stride())
        start = end
    return parts


def split_in_place(state: dict[str, Any]) -> set[str]:
    """Let a sharded state's joined matrices be read into their halves; return the names of those that are so.

    Megatron would read the halves elsewhere and join them when it has them all.
    """
    split = set()
    for name, item in state.items():
        if not isinstance(item, ShardedTensorFactory):
            continue
        halves = item.build()
        memory = item.data.untyped_storage().data_ptr()
        if all(half.data.untyped_storage().data_ptr() == memory for half in nested_values(halves)):
            state[name] = halves
            split.add(name)
    return split


@contextmanager
def save_without_copy() -> Iterator[None]:
    """Let a checkpoint's writer take contiguous parts of tensors without a copy.

    It would copy a tensor that is smaller than its storage, such as each half of a gated MLP's matrix, and hold all
    copies until the last is written: most of a model.
    """
    plain = MCoreSavePlanner.resolve_data

    def resolve(self: MCoreSavePlanner, item: "WriteItem") -> object:
        data = plain(self, item)
        if not isinstance(data, torch.Tensor) or not data.is_contiguous():
            return data
        start = data.storage_offset() * data.element_size()
        storage = data.untyped_storage()[start : start + data.nbytes]
        return torch.empty(0, dtype=data.dtype).set_(storage, 0, data.shape, data.stride())

    MCoreSavePlanner.resolve_data = resolve
    try:
        yield
    finally:
        MCoreSavePlanner.resolve_data = plain
