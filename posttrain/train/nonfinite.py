"""NaN, infinities and spikes in the loss or the gradient: the run stops before they are saved, leaves the step out, or
goes back and leaves out the batch.

A step's numbers are known after its update. Under `stop` and `rollback` the weights that it spoiled are never saved;
under `skip` the gradient is looked at before the update, at the cost of reading it once more.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from megatron.core.utils import to_local_if_dtensor

from posttrain.checkpoint import directories
from posttrain.checkpoint.progress import Progress
from posttrain.errors import UserError
from posttrain.train import rollback
from posttrain.train.batches import TrainOrder, describe_rows
from posttrain.utils.mappings import without_none

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from posttrain.train.context import RunContext
    from posttrain.train.run_batches import RunBatches

MOST_SKIPPED = 10  # in a row; after that it is the weights, not the batch
WINDOW, LEAST = 50, 5  # logged losses whose median a spike is measured by: at most, at least


class NonFinitePolicy:
    """The policy `trainer.on_nonfinite`, and `trainer.loss_spike_factor`.

    Args:
        policy: stop, skip or rollback.
        spike: how many times the median a loss must be to count as bad; None: never.
        max_rollbacks: most of them in a run.
        look: whether each gradient is looked at before its update.
        global_batch_size: rows of a step.
        progress: of the run; its last losses and its rollbacks.
        run_dir: of the run.
        is_first: whether this process writes files.
        order: () -> the order of the training rows.
    """

    def __init__(
        self,
        *,
        policy: str,
        spike: float | None,
        max_rollbacks: int,
        look: bool,
        global_batch_size: int,
        progress: Progress,
        run_dir: Path,
        is_first: bool,
        order: Callable[[], TrainOrder],
    ) -> None:
        self.policy = policy
        self.spike = spike
        self.max_rollbacks = max_rollbacks
        self.look = look
        self.global_batch_size = global_batch_size
        self.progress = progress
        self.run_dir = run_dir
        self.is_first = is_first
        self.order = order
        self.in_a_row = 0

    @classmethod
    def from_run(cls, run: "RunContext", batches: "RunBatches") -> "NonFinitePolicy":
        """The policy of a run."""
        policy = run.settings.on_nonfinite
        # Without a norm nothing else tells a bad gradient before the weights that it made are saved.
        look = policy == "skip" or (policy == "rollback" and not run.groups.optimizer.clip_grad)
        return cls(
            policy=policy,
            spike=run.settings.loss_spike_factor,
            max_rollbacks=run.settings.max_rollbacks,
            look=look,
            global_batch_size=run.settings.global_batch_size,
            progress=run.progress,
            run_dir=run.run_dir,
            is_first=run.is_first,
            order=lambda: batches.order,
        )

    def watch(self, optimizer: "MegatronOptimizer") -> None:
        """Have Megatron's optimizer leave out an update whose gradient isn't finite, on every rank, where we look."""
        if not self.look:
            return
        prepare = optimizer.prepare_grads

        def prepare_and_look() -> bool:
            found = prepare()
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            bad = torch.zeros((), device="cuda")
            for part in parts:
                for parameter in part.get_parameters():
                    gradient = getattr(parameter, "decoupled_grad", parameter.grad)  # of another format than the weight
                    if gradient is not None:
                        gradient = to_local_if_dtensor(gradient)
                        bad += (~torch.isfinite(gradient.sum())).float()
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
        known = without_none(numbers)
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
        rows = self.rows(first_row, self.global_batch_size)
        raise UserError(
            f"step {step}: {what}. The batch was rows {rows} of the training data. The checkpoints before this step "
            "are as they were; resume from them with a lower optimizer.lr, without these rows, or with "
            "trainer.on_nonfinite=rollback"
        )

    def spikes(self, loss: float) -> list[str]:
        """What to say against a finite loss; it counts among the last ones unless there is something."""
        last = self.progress.losses
        if self.spike and len(last) >= LEAST and loss > self.spike * median(last):
            return [
                f"loss is {loss:.4g}, {loss / median(last):.1f} times the median {median(last):.4g} of the last "
                f"{len(last)} (trainer.loss_spike_factor={self.spike:g})"
            ]
        last.append(loss)
        del last[:-WINDOW]
        return []

    def roll_back(self, step: int, first_row: int, what: str) -> None:
        """Record which rows to leave out.

        They are the step's, and those of the step before where that is undone as well: weights that a batch has
        spoiled show in the next one's loss.

        Raises:
            RolledBack: always, unless it has been done too often.
            UserError: it has.
        """
        size = self.global_batch_size
        before = self.progress.rollbacks
        if len(before) >= self.max_rollbacks:
            rows = self.rows(first_row, size)
            raise UserError(
                f"step {step}: {what}, after {len(before)} rollbacks (trainer.max_rollbacks). The batch was rows "
                f"{rows} of the training data; resume with a lower optimizer.lr, or look at these rows"
            )
        newest, _ = directories.newest(self.run_dir / "checkpoints")
        to = directories.step_of(newest) if newest else 0
        places = [first_row]
        if step - 1 > to:
            places.insert(0, first_row - size)
        skip = [self.order().place(index) for index in places]
        left_out = self.rows(places[0], size * len(places))
        if self.is_first:
            rollback.record(self.run_dir, before, step, to, what, skip)
        where = f"the checkpoint of step {to}" if newest else "the beginning"
        raise rollback.RolledBack(
            f"step {step}: {what}; going back to {where}, and on without rows {left_out} of the training data"
        )

    def rows(self, first: int, count: int) -> str:
        """The rows from the global index `first` on, in words."""
        return describe_rows(self.order(), first, count)
