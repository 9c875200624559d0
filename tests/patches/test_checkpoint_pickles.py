"""Code in a checkpoint's pickles is refused, wherever it lies; what real checkpoints hold is read."""

import io
import pickle
import random
from pathlib import Path

import pytest

from posttrain import patches
from posttrain.errors import UserError


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with a tensor and an object such as runs save; its directory."""
    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import numpy
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weight = ShardedTensor.from_rank_offsets("weight", torch.arange(6.0).bfloat16())
    dist_checkpointing.save({"weight": weight, "rng": ShardedObject("rng", state, (1,), (0,))}, folder)
    return folder


def load(folder):
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )

    CachedMetadataFileSystemReader.clear_metadata_cache()
    empty = ShardedTensor.from_rank_offsets("weight", torch.zeros(6).bfloat16())
    return dist_checkpointing.load({"weight": empty, "rng": ShardedObject("rng", None, (1,), (0,))}, folder)


def test_a_real_checkpoint_is_read(saved):
    import torch

    found = load(saved)
    assert found["weight"].equal(torch.arange(6.0).bfloat16()) and found["rng"]["python"] == random.getstate()


@pytest.mark.parametrize("hidden", ["alone", "inside"])
def test_code_in_the_metadata(hidden, saved, tmp_path):
    file, canary = saved / ".metadata", tmp_path / "canary"
    if hidden == "alone":
        file.write_bytes(pickle.dumps(Canary(canary)))
    else:
        metadata = pickle.loads(file.read_bytes())
        metadata.planner_data = Canary(canary)
        file.write_bytes(pickle.dumps(metadata))
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    with pytest.raises(UserError, match=r"\.metadata asks for .*could run code"):
        dist_checkpointing.load_tensors_metadata(saved)
    with pytest.raises((CheckpointException, UserError)):
        load(saved)
    assert not canary.exists()
    pickle.loads(file.read_bytes())
    assert canary.exists()  # it would have


def test_code_in_an_object(saved, tmp_path):
    import torch
    from torch.distributed.checkpoint.api import CheckpointException

    canary, bad = tmp_path / "canary", io.BytesIO()
    torch.save([Canary(canary)], bad)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith("rng"))
    place = metadata.storage_data[index]
    (saved / "bad").write_bytes(bad.getvalue())
    place.relative_path, place.offset, place.length = "bad", 0, len(bad.getvalue())
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((CheckpointException, pickle.UnpicklingError), match="Weights only load failed"):
        load(saved)
    assert not canary.exists()


def test_code_in_a_training_state(tmp_path):
    """Megatron-Bridge's own reader of train_state.pt."""
    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from megatron.bridge.training.utils.checkpoint_utils import read_train_state

    torch.save({"step": Canary(tmp_path / "canary")}, tmp_path / "train_state.pt")
    with pytest.raises(RuntimeError, match="Unable to load train state"):
        read_train_state(str(tmp_path / "train_state.pt"))
    assert not (tmp_path / "canary").exists()
