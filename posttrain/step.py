"""The forward step: Megatron-Bridge's own, with the batch's tokens counted on the way."""

from collections.abc import Iterable
from typing import Any

from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.state import GlobalState

from posttrain.batches import Counts


class ForwardStep:
    """Callable for `finetune`.

    Attributes:
        counts: tokens of the batches this process has been given since they were last taken.
    """

    def __init__(self) -> None:
        self.counts = Counts()

    def __call__(self, state: GlobalState, data_iterator: Iterable, model: Any, return_schedule_plan: bool = False):
        """One micro-batch forward; returns per-token losses and the function that reduces them."""
        return forward_step(state, self.counts.tap(data_iterator), model, return_schedule_plan)
