"""NaN, infinities and spikes in the loss or the gradient: the run stops before they are saved, leaves the step out, or
goes back and leaves out the batch.

A step's numbers are known after its update. Under `stop` and `rollback` the weights that it spoiled are never saved;
under `skip` the gradient is looked at before the update, at the cost of reading it once more.
"""

import math
from statistics import median
from typing import Any

import torch

from posttrain.checkpoint import directories
from posttrain.errors import UserError
from posttrain.train import rollback

MOST_SKIPPED = 10  # in a row; after that it is the weights, not the batch
WINDOW, LEAST = 50, 5  # logged losses whose median a spike is measured by: at most, at least


class NonFinitePolicy:
    """The policy `trainer.on_nonfinite`, and `trainer.loss_spike_factor`.

    Args:
        trainer: the run's trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.policy = trainer.settings.on_nonfinite
        self.spike = trainer.settings.loss_spike_factor
        # Without a norm nothing else tells a bad gradient before the weights that it made are saved.
        self.look = self.policy == "skip" or (self.policy == "rollback" and not trainer.optimizer.clip_grad)
        self.in_a_row = 0

    def watch(self, optimizer: Any) -> None:
        """Have Megatron's optimizer leave out an update whose gradient isn't finite, on every rank, where we look."""
        if not self.look:
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
        """After a step; on every rank with the same numbers.

        Args:
            step: it.
            first_row: rows that the run had been trained on before it.
            skipped: whether its update was left out.
            numbers: what to look at, None where it isn't known; `loss` is also compared with those before.

        Raises:
            UserError: one of them is NaN, infinite or a spike, and it can't be skipped.
            RolledBack: the run goes back instead.
        """
        known = {name: value for name, value in numbers.items() if value is not None}
        bad = [f"{name.replace('_', ' ')} is {value}" for name, value in known.items() if not math.isfinite(value)]
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not bad and known.get("loss") is not None:
            bad = self.spikes(known["loss"])
        if skipped and (self.policy == "skip" and self.in_a_row < MOST_SKIPPED):
            return
        if skipped:
            bad = [f"{self.in_a_row} update{'s' * (self.in_a_row > 1)} in a row had no finite gradient"]
        if not bad:
            return
        what = " and ".join(bad)
        if self.policy == "rollback":
            self.roll_back(step, first_row, what)
        raise UserError(
            f"step {step}: {what}. The batch was rows {self.rows(first_row)} of the training data. The checkpoints "
            "before this step are as they were; resume from them with a lower optimizer.lr, without these rows, or "
            "with trainer.on_nonfinite=rollback"
        )

    def spikes(self, loss: float) -> list[str]:
        """What to say against a finite loss; it counts among the last ones unless there is something."""
        last = self.trainer.progress.losses
        if self.spike and len(last) >= LEAST and loss > self.spike * median(last):
            return [
                f"loss is {loss:.4g}, {loss / median(last):.1f} times the median {median(last):.4g} of the last "
                f"{len(last)} (trainer.loss_spike_factor={self.spike:g})"
            ]
        last.append(loss)
        del last[:-WINDOW]
        return []

    def roll_back(self, step: int, first_row: int, what: str) -> None:
        """Leave word of which rows to leave out.

        They are the step's, and those of the step before where that is undone as well: weights that a batch has
        spoiled show in the next one's loss.

        Raises:
            RolledBack: always, unless it has been done too often.
            UserError: it has.
        """
        t, size = self.trainer, self.trainer.settings.global_batch_size
        before = t.progress.rollbacks
        if len(before) >= t.settings.max_rollbacks:
            raise UserError(
                f"step {step}: {what}, after {len(before)} rollbacks (trainer.max_rollbacks). The batch was rows "
                f"{self.rows(first_row)} of the training data; resume with a lower optimizer.lr, or look at these rows"
            )
        newest, _ = directories.newest(t.run_dir / "checkpoints")
        to = directories.step_of(newest) if newest else 0
        places = [first_row - size, first_row] if step - 1 > to else [first_row]
        skip = [t.train_order.place(index) for index in places]
        left_out = self.rows(places[0], size * len(places))
        if t.rank == 0:
            rollback.record(t.run_dir, before, step, to, what, skip)
        raise rollback.RolledBack(
            f"step {step}: {what}; going back to {f'the checkpoint of step {to}' if newest else 'the beginning'}, and "
            f"on without rows {left_out} of the training data"
        )

    def rows(self, first: int, count: int | None = None) -> str:
        """The rows from the global index `first` on, a batch of them by default, in words."""
        count = count or self.trainer.settings.global_batch_size
        rows = [self.trainer.train_order.row_at(index) for index in range(first, first + count)]
        return ", ".join(map(str, rows[:32])) + (", ..." if len(rows) > 32 else "")
