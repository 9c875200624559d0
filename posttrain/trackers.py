"""Experiment trackers, written to by the first rank. No tracker library at import."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Tracker:
    """Where numbers go besides metrics.jsonl."""

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        """Begin the run `name` with its configuration."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`."""

    def finish(self, summary: dict[str, Any]) -> None:
        """End the run."""


@dataclass
class Wandb(Tracker):
    """Weights & Biases; `mode=offline` needs no account and leaves RUN_DIR/wandb."""

    project: str = "posttrain"
    entity: str | None = None
    mode: str = "online"
    tags: Sequence[str] = ()

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=self.project, entity=self.entity, mode=self.mode, tags=list(self.tags), name=name,
            dir=str(run_dir), config=config, settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


@dataclass
class TensorBoard(Tracker):
    """TensorBoard event files in RUN_DIR/tensorboard."""

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        self.writer.close()
