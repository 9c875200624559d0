"""When a run saves and what it resumes from. No torch at import."""

from dataclasses import dataclass


@dataclass
class Checkpoint:
    """The config group `checkpoint`.

    Attributes:
        save: whether to save at all.
        save_interval: steps between saves; None: at the end only.
        save_total_limit: how many of the newest to keep; None: all.
        keep_best: keep the one with the lowest validation loss besides the newest.
        save_optimizer: whether optimizer state and RNG are saved, without which a run can't be resumed.
        async_save: write in the background.
    """

    save: bool = True
    save_interval: int | None = None
    save_total_limit: int | None = None
    keep_best: bool = False
    save_optimizer: bool = True
    async_save: bool = False
