"""Experiment trackers, written to by the first rank. No tracker library at import."""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import UserError

HARMLESS = ("project", "mode", "disabled")  # of wandb's settings: Wandb gives the first two itself


class Tracker:
    """Where numbers go besides metrics.jsonl.

    Attributes:
        notice: what the person at the keyboard should know, once it has started; empty: nothing.
    """

    notice = ""

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
    mode: Literal["online", "offline", "disabled"] = "online"
    tags: Sequence[str] = ()

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        """Begin the run.

        Raises:
            UserError: a file in the working directory says where it is sent.
        """
        import wandb

        refuse_workspace()
        host = str(wandb.setup().settings.base_url)
        if host != wandb.Settings.model_fields["base_url"].default and self.mode == "online":
            self.notice = f"wandb: the run is sent to {host}"
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            tags=list(self.tags),
            name=name,
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({name: table}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


def refuse_workspace() -> None:
    """Refuse settings of wandb's in the working directory that send a run, and the API key with it, elsewhere.

    wandb reads ./wandb/settings above the user's own ~/.config/wandb/settings, and such a folder may come from anybody.

    Raises:
        UserError: naming the file and the setting.
    """
    import wandb

    settings = wandb.Settings()  # without the user's own file, which wandb.setup() adds
    default = wandb.Settings.model_fields["base_url"].default
    for key, value in settings.read_system_settings().all().items():
        same = key == "base_url" and value in (default, os.environ.get("WANDB_BASE_URL"))
        if not same and key not in HARMLESS:
            raise UserError(
                f"{settings.settings_workspace}: sets {key}; a file in the working directory may not say where a run "
                f"is sent: remove it there, and set it in the environment (WANDB_{key.upper()}) or in wandb's own "
                "~/.config/wandb/settings"
            )


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
