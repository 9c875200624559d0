"""A checkpoint's pickles hold what checkpoints hold: anything else in them is refused, not run."""

import pickle
from types import ModuleType
from typing import Any, BinaryIO

from posttrain.errors import UserError
from posttrain.patches import patch
from posttrain.patches.deferred import on_import

METADATA = "torch.distributed.checkpoint.metadata"
CLASSES = {
    *((METADATA, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    # What Megatron-Core's earlier versions left in it; empty classes.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
}  # fmt: skip


class MetadataUnpickler(pickle.Unpickler):
    """Reads a checkpoint's .metadata: names, shapes, dtypes, places in files."""

    def find_class(self, module: str, name: str) -> Any:
        """The class that the pickle asks for.

        Raises:
            UserError: it is none that describes a checkpoint, so it can only be there to do something else.
        """
        import torch

        if (module, name) in CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(
            f"checkpoint: its .metadata asks for {module}.{name}, which no checkpoint needs and which could run code; "
            "it was refused, don't trust this checkpoint"
        )


def load(file: BinaryIO) -> Any:
    """Return the metadata in `file`."""
    return MetadataUnpickler(file).load()


def _restrict_metadata(module: ModuleType) -> None:
    """Give the file reader's module an `pickle.load` that is restricted; it writes with the real one."""
    restricted = ModuleType("pickle")
    restricted.__dict__.update(pickle.__dict__, load=load)
    module.pickle = restricted


def _restrict_objects(module: ModuleType) -> None:
    """Read objects as torch.load does by default: tensors, plain containers and the classes that core registers."""
    import torch

    def load_bytes(self, read_item, value) -> None:
        found = torch.load(value, weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            module.set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found

    module.DefaultLoadPlanner.load_bytes = load_bytes


@patch(
    "checkpoint-pickles",
    symptom="torch reads a checkpoint's .metadata and objects with unrestricted pickles: a stranger's could run code",
    versions={"torch": ">=2.9,<2.13"},
)
def restrict_checkpoint_pickles() -> None:
    """Allow what describes a checkpoint, by name."""
    on_import("torch.distributed.checkpoint.filesystem", _restrict_metadata)
    on_import("torch.distributed.checkpoint.default_planner", _restrict_objects)
