"""After which steps a run saves, besides the last one."""

import time

from posttrain.checkpoint import Checkpoint
from posttrain.train.run_batches import maximum_over_all

MOST_TIME = 1 / 20  # share of a run's time that saves by the clock may take


class SaveSchedule:
    """Saves every so many steps, and after so many minutes without one.

    Args:
        group: the config group `checkpoint`.
        world: processes of the run.

    Attributes:
        interval: steps; None: none by the step.
        seconds: on the clock; None: none by the clock. Without optimizer state none could be resumed from.
    """

    def __init__(self, group: Checkpoint, world: int) -> None:
        self.interval = group.save_interval
        self.seconds: float | None = None
        if group.save and group.save_optimizer and group.save_interval_minutes is not None:
            self.seconds = group.save_interval_minutes * 60
        self.world = world
        self.took = 0.0  # the last save, seconds
        self.since = time.monotonic()
        self.asked: float | None = None

    def begin(self) -> None:
        """A save begins."""
        self.asked = time.monotonic()

    def begin_step(self) -> None:
        """A step begins: if there was a save before it, that is over, and the clock starts again."""
        if self.asked is not None:
            self.since = time.monotonic()
            self.took = self.since - self.asked
            self.asked = None

    def overdue(self) -> bool:
        """Whether the clock asks for a save; the same on every process, of which the slowest counts. A collective call.

        A save that takes long is put off until it is cheap enough.
        """
        if self.seconds is None:
            return False
        due = max(self.seconds, self.took / MOST_TIME)
        left = time.monotonic() - self.since - due
        return maximum_over_all([left], self.world)[0] >= 0
