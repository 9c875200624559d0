"""How the rows of an epoch become global batches: whole ones, and a last one of the rows that are left.

A step has as many places as a whole batch has rows. The places of an epoch's last step that no row is left for are
empty: nothing is trained there, and since a step's loss is divided by its supervised tokens, such a step is that of a
smaller batch.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows.

    Attributes:
        rows: packed sequences of the training data.
        batch: places of a step, `trainer.global_batch_size`.
    """

    rows: int
    batch: int

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.rows // self.batch)

    @property
    def last_batch(self) -> int:
        """Rows of its last step."""
        return self.rows - (self.steps - 1) * self.batch

    @property
    def places(self) -> int:
        """Places of its steps, empty ones included."""
        return self.steps * self.batch

    def trained(self, steps: int) -> int:
        """Rows of a run's first `steps` steps, each as often as it is in them."""
        done, begun = divmod(steps, self.steps)
        return done * self.rows + begun * self.batch

    def describe(self) -> str:
        """Its steps and the size of the last, in words."""
        if self.steps == 1:
            return f"1 step of {self.rows} row{'s' * (self.rows > 1)}"
        words = f"{self.steps:,} steps of {self.batch} row{'s' * (self.batch > 1)}"
        if self.last_batch < self.batch:
            words += f", the last of {self.last_batch}"
        return words


def planned_steps(max_steps: int | None, epochs: float | None, epoch: Epoch | None) -> int | None:
    """Optimizer steps of a whole run; of a part of an epoch, a step that has begun counts.

    Args:
        max_steps: `trainer.max_steps`, which decides where it is given.
        epochs: `trainer.epochs`; None: one.
        epoch: of the training rows; None: they are not counted.

    Returns:
        None where it depends on the rows and these are not counted.
    """
    if max_steps is not None:
        return max_steps
    if epoch is None:
        return None
    steps = (epochs or 1.0) * epoch.steps
    return math.ceil(round(steps, 6))  # 1.1 x 10 is a little more than 11
