"""Megatron on a CPU in this process, set up once: patches, one-rank process group, model-parallel state."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """Initialise torch.distributed (gloo, one rank) and Megatron's parallel state, unless another test has."""
    from posttrain import patches

    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch

    torch.set_num_threads(1)  # tiny matrices; more threads only wait for each other
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        store = tmp_path_factory.mktemp("store") / "file"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
