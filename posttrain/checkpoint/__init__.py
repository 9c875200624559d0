"""When a run saves and what it resumes from. No torch at import."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.checkpoint.manager import RunCheckpointConfig, SavedRun


@dataclass
class Checkpoint:
    """The config group `checkpoint`.

    Attributes:
        save: whether to save at all.
        save_interval: steps between saves; None: at the end only.
        save_total_limit: how many of the newest to keep; None: all.
        save_optimizer: whether optimizer state and RNG are saved, without which a run can't be resumed.
        async_save: write in the background.
    """

    save: bool = True
    save_interval: int | None = None
    save_total_limit: int | None = None
    save_optimizer: bool = True
    async_save: bool = False

    def build(self, directory: Path, base: Path, resume_from: Path | None, run: "SavedRun") -> "RunCheckpointConfig":
        """Return Megatron-Bridge's checkpoint configuration, with our manager in it.

        Args:
            directory: where this run's checkpoints go.
            base: Hugging Face directory of the weights before training.
            resume_from: the checkpoint to go on from.
            run: what the manager needs of the run.
        """
        from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

        from posttrain.checkpoint.manager import RunCheckpointConfig

        register_allowed_target_prefix("posttrain.checkpoint.manager")
        return RunCheckpointConfig(
            pretrained_checkpoint=str(base),
            save=str(directory) if self.save else None,
            load=str(resume_from) if resume_from else None,
            save_interval=self.save_interval,
            most_recent_k=-1,  # the manager removes old ones
            save_optim=self.save_optimizer,
            save_rng=self.save_optimizer,
            async_save=self.async_save,
            async_strategy="mcore",
            ckpt_format="torch_dist",
            fully_parallel_save=False,
            custom_manager_class="posttrain.checkpoint.manager.Manager",
            saved_run=run,
        )
