"""A synchronous checkpoint needs no second process."""

import multiprocessing

from posttrain import patches


def test_save_and_load_start_no_process(tmp_path):
    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    kept = filesystem_async._results_queue
    before = multiprocessing.active_children()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weight = torch.arange(6.0)
    dist_checkpointing.save({"weight": ShardedTensor.from_rank_offsets("weight", weight)}, folder)
    assert multiprocessing.active_children() == before and filesystem_async._results_queue is kept

    empty = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(6))}
    assert torch.equal(dist_checkpointing.load(empty, folder)["weight"], weight)
