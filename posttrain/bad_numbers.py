"""NaN and infinities in the loss or the gradient: the run stops before they are saved, or leaves the step out.

A step's numbers are known after its update. Under `stop` the weights that it spoiled are never saved; under `skip`
the gradient is looked at before the update, at the cost of reading it once more.
"""

import math
from typing import Any

import torch

from posttrain.errors import UserError

MOST_SKIPPED = 10  # in a row; after that it is the weights, not the batch


class BadNumbers:
    """The policy `trainer.bad_numbers`.

    Args:
        trainer: the run's trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.skip = trainer.settings.bad_numbers == "skip"
        self.in_a_row = 0

    def watch(self, optimizer: Any) -> None:
        """Under `skip`, have Megatron's optimizer leave out an update whose gradient isn't finite, on every rank."""
        if not self.skip:
            return
        prepare = optimizer.prepare_grads

        def prepare_and_look() -> bool:
            found = prepare()
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            grads = [p.grad for part in parts for p in part.get_parameters() if p.grad is not None]
            bad = torch.zeros((), device="cuda")
            for grad in grads:
                bad += (~torch.isfinite(grad.sum())).float()
            torch.distributed.all_reduce(bad)
            return found or bool(bad)

        optimizer.prepare_grads = prepare_and_look

    def check(self, step: int, first_row: int, skipped: bool, **numbers: float | None) -> None:
        """After a step.

        Args:
            step: it.
            first_row: rows that the run had been trained on before it.
            skipped: whether its update was left out.
            numbers: what to look at, None where it isn't known.

        Raises:
            UserError: one of them is NaN or infinite, and it can't be skipped.
        """
        known = {name: value for name, value in numbers.items() if value is not None}
        bad = [f"{name.replace('_', ' ')} is {value}" for name, value in known.items() if not math.isfinite(value)]
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if (skipped and self.in_a_row < MOST_SKIPPED) or not (bad or skipped):
            return
        count = self.trainer.settings.global_batch_size
        rows = [self.trainer.train_order.row_at(index) for index in range(first_row, first_row + count)]
        named = ", ".join(map(str, rows[:32])) + (", ..." if len(rows) > 32 else "")
        what = f"{self.in_a_row} updates in a row had no finite gradient" if skipped else " and ".join(bad)
        raise UserError(
            f"step {step}: {what}. The batch was rows {named} of the training data. The checkpoints before this step "
            "are as they were; go on from them with a lower optimizer.lr, without these rows, or with "
            "trainer.bad_numbers=skip"
        )
