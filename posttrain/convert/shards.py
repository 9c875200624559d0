"""Safetensors shards written as the tensors come, so that no more than one shard is in memory."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from posttrain.models.headers import INDEX

SHARD_BYTES = 5_000_000_000  # the hub's usual size


class ShardWriter:
    """Writes model.safetensors, or model-0000i-of-0000n.safetensors with their index.

    Args:
        directory: where to.
        limit: most bytes of a shard, unless one tensor is larger.
    """

    def __init__(self, directory: Path, limit: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.limit = limit
        self.shard: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.names: list[list[str]] = []  # of each written shard

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it must not change before the shard is written."""
        size = tensor.nbytes
        if self.shard and self.bytes + size > self.limit:
            self._flush()
        memory = tensor.untyped_storage().data_ptr()
        shared = any(other.untyped_storage().data_ptr() == memory for other in self._last(2))
        self.shard[name] = tensor.clone() if shared else tensor.contiguous()
        self.bytes += size
        self.total += size

    def close(self) -> None:
        """Write what is left, give the files their names, write the index."""
        self._flush()
        count = len(self.names)
        if count == 1:
            os.replace(self._file(0), self.directory / "model.safetensors")
            return
        where: dict[str, str] = {}
        for number, names in enumerate(self.names):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._file(number), self.directory / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _last(self, count: int) -> list[torch.Tensor]:
        """The newest tensors: a tied one follows the one that it is tied to."""
        return list(self.shard.values())[-count:]

    def _file(self, number: int) -> Path:
        return self.directory / f"shard-{number}.tmp"

    def _flush(self) -> None:
        save_file(self.shard, self._file(len(self.names)), metadata={"format": "pt"})
        with open(self._file(len(self.names)), "rb") as file:
            os.fsync(file.fileno())
        self.names.append(list(self.shard))
        self.shard = {}
        self.bytes = 0
