"""The forward step that Megatron-Bridge's training loop calls: one micro-batch of packed sequences through the model.

Nothing in it waits for the device, so that a step can be captured in a CUDA graph.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge.training.gpt_step import _partition_packed_batch_for_cp
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from posttrain.ops.linear_cross_entropy import supervised_losses

ON_DEVICE = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q", "supervised_at", "supervised_mask")


def forward_step(
    state: GlobalState, data_iterator: Iterator[dict[str, Any]], model: Any, return_schedule_plan: bool = False
) -> tuple[torch.Tensor, partial]:
    """Per-token losses of one micro-batch, and the function that sums them over the supervised tokens.

    Args:
        state: Megatron-Bridge's global state.
        data_iterator: of batches as posttrain.train.batches.Collate makes them.
        model: this pipeline stage's part of the model.

    Returns:
        The stage's output (losses [1, k] of the supervised tokens on the last stage) and
        (output) -> (sum, number of supervised tokens, report).
    """
    batch = next(data_iterator)
    batch = {key: batch[key].cuda(non_blocking=True) for key in ON_DEVICE} | {"max_seqlen": batch["max_seqlen"]}
    # A new tensor object for each batch, with which what is derived from the boundaries is kept: see the patch
    # packed-rope.
    ends = batch["cu_seqlens_q"].view(-1)
    mask, selection = batch["loss_mask"], {}
    if parallel_state.get_context_parallel_world_size() > 1:
        divided = {key: batch[key] for key in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q")}
        batch |= _partition_packed_batch_for_cp(divided, parallel_state.get_context_parallel_group())
        mask = batch["loss_mask"]
    elif state.cfg.dataset.skip_prompt_logits and parallel_state.is_pipeline_last_stage():
        selection = {"output_processor": supervised_losses, "output_processor_context": batch["supervised_at"]}
        mask = batch["supervised_mask"]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=batch["max_seqlen"],
        max_seqlen_kv=batch["max_seqlen"],
        pad_between_seqs=False,  # padding is a sequence of its own; asking the device would wait for it
    )
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed,
        **selection,
    )
    # NaN is looked for once a step in the gradient's norm, not here: that would wait for the device.
    reduce = partial(masked_next_token_loss, mask, check_for_nan_in_loss=False)
    return output, reduce
