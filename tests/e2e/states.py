"""What two checkpoints hold, compared to the bit."""

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def saved(run_dir, step):
    """What a run's checkpoint holds: weights, optimizer state, random states, counters."""
    state = {}
    reader = FileSystemReader(run_dir / "checkpoints" / f"iter_{step:07d}")
    _load_state_dict(state, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert any(key.startswith("optimizer") for key in state) and any(key.startswith("rng_state") for key in state)
    return state


def equal(one, other):
    """Whether two nested values are the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):  # NaN is itself here
        return one.shape == other.shape and torch.equal(one.isnan(), other.isnan()) and torch.equal(
            one.nan_to_num(), other.nan_to_num()
        )  # fmt: skip
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    return one == other


def same_state(one, other):
    """Whether two checkpoints hold the same to the bit, but for what lies between the parameters in a bucket.

    The distributed optimizer saves whole buckets, in which parameters begin at multiples of 64; nothing sets the rest.
    """
    parameters = sum(
        value.numel() for name, value in one.items()
        if isinstance(value, torch.Tensor) and name.startswith(("decoder", "embedding", "output_layer"))
    )  # fmt: skip
    assert one.keys() == other.keys()
    for name, value in one.items():
        if ".bucket_idx_" in name and isinstance(value, torch.Tensor):
            assert 0 < value.numel() - parameters < 0.01 * parameters
            assert (value != other[name]).sum() <= value.numel() - parameters, name
        else:
            assert equal(value, other[name]), name
