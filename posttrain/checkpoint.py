"""When a run saves and from what it goes on. No torch at import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACKER = "latest_train_state.pt"


@dataclass
class Checkpoint:
    """The config group `checkpoint`.

    Attributes:
        save: whether to save at all.
        save_interval: steps between saves; None: at the end only.
        keep_last: how many of the newest to keep; None: all.
        save_optimizer: whether optimizer state and RNG are saved, without which a run can't be resumed.
        async_save: write in the background.
    """

    save: bool = True
    save_interval: int | None = None
    keep_last: int | None = None
    save_optimizer: bool = True
    async_save: bool = False

    def build(self, directory: Path, base: str, resume_from: Path | None) -> Any:
        """Return Megatron-Bridge's checkpoint configuration.

        Args:
            directory: where this run's checkpoints go.
            base: Hugging Face directory of the weights before training.
            resume_from: checkpoint directory of this or another run to go on from.
        """
        from megatron.bridge.training.config import CheckpointConfig

        return CheckpointConfig(
            pretrained_checkpoint=base,
            save=str(directory) if self.save else None,
            load=str(resume_from) if resume_from else None,
            save_interval=self.save_interval,
            most_recent_k=self.keep_last if self.keep_last is not None else -1,
            save_optim=self.save_optimizer,
            save_rng=self.save_optimizer,
            async_save=self.async_save,
            async_strategy="mcore",
            ckpt_format="torch_dist",
            fully_parallel_save=False,
        )


def exists(directory: Path) -> bool:
    """Whether a finished checkpoint is in `directory`."""
    return (directory / TRACKER).is_file()
