"""Experiment trackers, written to by the first rank. No tracker library at import."""

import textwrap
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

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Record texts at `step`: rows of the same keys."""

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

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({name: table}, step=step)

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

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        for index, row in enumerate(rows):  # markdown; an indented text is shown as it is
            text = "\n\n".join(f"**{key}**\n\n{textwrap.indent(value, '    ')}" for key, value in row.items())
            self.writer.add_text(f"{name}/{index}", text, step)

    def finish(self, summary: dict[str, Any]) -> None:
        self.writer.close()
