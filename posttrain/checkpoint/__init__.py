"""When a run saves and what it resumes from. No torch at import."""

from dataclasses import dataclass


@dataclass
class Checkpoint:
    """The config group `checkpoint`.

    Attributes:
        save: whether to save at all.
        save_interval: steps between saves; None: none by the step.
        save_interval_minutes: minutes between saves that last until the next one; None: none by the clock.
        save_total_limit: how many of the newest to keep; None: all but those of the clock.
        keep_best: save at each new lowest validation loss, and keep the lowest besides the newest.
        save_optimizer: whether optimizer state and RNG are saved, without which a run can't be resumed.
        async_save: write in the background.
    """

    save: bool = True
    save_interval: int | None = None
    save_interval_minutes: float | None = 15.0
    save_total_limit: int | None = None
    keep_best: bool = False
    save_optimizer: bool = True
    async_save: bool = False
