"""Megatron in this one process, on the CPU."""

import os


def start() -> None:
    """Apply the patches and set up process groups of one; before anything of Megatron is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion needs memory, not arithmetic
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from posttrain import patches

    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from torch._C._distributed_c10d import HashStore

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
