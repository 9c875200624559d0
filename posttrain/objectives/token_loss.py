"""The forward step that Megatron-Bridge's training loop calls: cross entropy of packed sequences, summed by weight.

Nothing in it waits for the device, so that a step can be captured in a CUDA graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.training.gpt_step import _partition_packed_batch_for_cp
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from posttrain.ops.linear_cross_entropy import supervised_losses

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState

ON_DEVICE = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "cu_seqlens_q",
    "supervised_at",
    "supervised_mask",
    "normalizer",
)
DIVIDED = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q")  # by context parallelism

Report = dict[str, torch.Tensor]


@dataclass
class PackedRows(PackedSeqParams):
    """Boundaries of packed sequences.

    Attributes:
        whole_rows: how many rows of equal length there are where each is one sequence; 0: boundaries are anywhere.
    """

    whole_rows: int = 0


class TokenLoss:
    """Losses of one micro-batch's tokens, and the function that sums them by their weights.

    Args:
        supervised_logits_only: whether the output layer sees the tokens with a weight alone.
    """

    def __init__(self, supervised_logits_only: bool) -> None:
        self.supervised_logits_only = supervised_logits_only

    def __call__(
        self,
        state: "GlobalState",
        data_iterator: Iterator[dict[str, Any]],
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[torch.Tensor, "partial[tuple[torch.Tensor, torch.Tensor, Report]]"]:
        """Run the model.

        Args:
            state: Megatron-Bridge's global state.
            data_iterator: of batches as posttrain.train.batches.Collate makes them.
            model: this pipeline stage's part of the model.

        Returns:
            The stage's output, losses [1, k] on the last stage, and output -> (sum, normaliser, report).
        """
        host = next(data_iterator)
        batch = {key: host[key].cuda(non_blocking=True) for key in ON_DEVICE}
        # A new tensor object for each batch, with which what is derived from the boundaries is kept: see the patch
        # packed-rope.
        ends = batch["cu_seqlens_q"].view(-1)
        weights = batch["loss_mask"]
        normalizer = batch["normalizer"]
        selection = {}
        if parallel_state.get_context_parallel_world_size() > 1:
            divided = {key: batch[key] for key in DIVIDED}
            batch |= _partition_packed_batch_for_cp(divided, parallel_state.get_context_parallel_group())
            weights = batch["loss_mask"]
            if parallel_state.get_context_parallel_rank() > 0:  # it is of the whole micro-batch
                normalizer = torch.zeros_like(normalizer)
        elif self.supervised_logits_only and parallel_state.is_pipeline_last_stage():
            selection = {"output_processor": supervised_losses, "output_processor_context": batch["supervised_at"]}
            weights = batch["supervised_mask"]
        packed = PackedRows(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=host["max_seqlen"],
            max_seqlen_kv=host["max_seqlen"],
            pad_between_seqs=False,  # padding is a sequence of its own; asking the device would wait for it
            whole_rows=host["whole_rows"],
        )
        output = model(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            labels=batch["labels"],
            packed_seq_params=packed,
            **selection,
        )
        return output, partial(weighted_sum, weights, normalizer)


def weighted_sum(
    weights: torch.Tensor, normalizer: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Sum a micro-batch's losses; Megatron divides by the normaliser, once over the whole global batch.

    Non-finite numbers are looked for once a step in the gradient's norm, not here: that would wait for the device.

    Args:
        weights: float32[1, k].
        normalizer: int32[], what the weights sum to.
        losses: [1, k].

    Returns:
        (sum, normaliser, {"lm loss": float32[2], both of them}).
    """
    total = torch.sum(losses.view(-1).float() * weights.view(-1).float())
    count = normalizer.clone().detach()
    return total, count, {"lm loss": torch.cat([total.clone().detach().view(1), count.view(1)])}
