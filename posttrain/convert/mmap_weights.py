"""Weights in a mapped file instead of the process's memory: the kernel holds as much of it as there is room for."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError


def move(parts: list[torch.nn.Module], directory: Path) -> list[torch.nn.Module]:
    """Return `parts` with parameters in a file without a name in `directory`, gone with the process; values are lost.

    Raises:
        UserError: the disk has no room for it.
    """
    parameters = list({id(p): p for part in parts for p in part.parameters()}.values())
    size = sum(p.numel() * p.element_size() for p in parameters)
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would kill the process
        except OSError as error:
            raise UserError(f"convert.out: {size / 1e9:.1f} GB are needed in {directory} meanwhile: {error}") from error
        storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, nbytes=size)
    start = 0
    for p in sorted(parameters, key=lambda p: -p.element_size()):  # aligned
        end = start + p.numel() * p.element_size()
        p.data = torch.empty(0, dtype=p.dtype).set_(storage[start:end], 0, p.shape, p.stride())
        start = end
    return parts


def in_place(state: dict[str, Any]) -> set[str]:
    """Let a sharded state's joined matrices be read into their halves; return the names of those that are so.

    Megatron would read the halves elsewhere and join them when it has them all.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    done = set()
    for name, item in state.items():
        if isinstance(item, ShardedTensorFactory):
            built, memory = item.build(), item.data.untyped_storage().data_ptr()
            if all(half.data.untyped_storage().data_ptr() == memory for half in nested_values(built)):
                state[name] = built
                done.add(name)
    return done


@contextmanager
def saved_as_they_lie() -> Iterator[None]:
    """Let a checkpoint's writer take contiguous parts of tensors without a copy.

    It would copy a tensor that is smaller than its storage, such as each half of a gated MLP's matrix, and hold all
    copies until the last is written: most of a model.
    """
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    plain = MCoreSavePlanner.resolve_data

    def resolve(self, item):
        found = plain(self, item)
        if not isinstance(found, torch.Tensor) or not found.is_contiguous():
            return found
        start, size = found.storage_offset() * found.element_size(), found.numel() * found.element_size()
        storage = found.untyped_storage()[start : start + size]
        return torch.empty(0, dtype=found.dtype).set_(storage, 0, found.shape, found.stride())

    MCoreSavePlanner.resolve_data = resolve
    try:
        yield
    finally:
        MCoreSavePlanner.resolve_data = plain
