"""TensorBoard's event files."""

import json
import shlex
import textwrap
from dataclasses import dataclass
from typing import Any

from posttrain.config.trial_names import flatten
from posttrain.train.trackers.tracker import TrackedRun, Tracker

# What the table of hyperparameters has of every run, besides what varies in its sweep.
HYPERPARAMETERS = (
    "model.path",
    "peft._target_",
    "peft.rank",
    "peft.alpha",
    "optimizer.lr",
    "optimizer.weight_decay",
    "scheduler.lr_decay_style",
    "trainer.global_batch_size",
    "trainer.seq_length",
    "seed",
)
METRICS = ("val/loss", "train/loss")  # that the table of hyperparameters is sorted by


@dataclass
class TensorBoard(Tracker):
    """TensorBoard event files in RUN_DIR/tensorboard."""

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        resumed = run.resumed
        # Points from this step on are hidden, in whichever file they are; those that are not lost are written again.
        # A first start says so as well: TensorBoard takes the first that it reads for the beginning.
        self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=resumed.step if resumed else 0)
        config = json.dumps(run.recorded_config, indent=2, ensure_ascii=False)
        self.writer.add_text("config", textwrap.indent(config, "    "), 0)
        experiment, begun, self.ended = hparams(hyperparameters(run), dict.fromkeys(METRICS, 0.0))
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(experiment)
        self.writer.file_writer.add_summary(begun)
        if resumed:
            for point in resumed.points:
                self.log(resumed.step, point)
            self.table(resumed.step, "samples", resumed.samples)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        for index, row in enumerate(rows):  # markdown; an indented text is shown as it is
            text = "\n\n".join(f"**{key}**\n\n{textwrap.indent(value, '    ')}" for key, value in row.items())
            self.writer.add_text(f"{name}/{index}", text, step)

    def finish(self, summary: dict[str, Any]) -> str | None:
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(self.ended)
        self.writer.close()
        return f"tensorboard: to look at it: tensorboard --logdir {shlex.quote(self.writer.log_dir)}"


def hyperparameters(run: TrackedRun) -> dict[str, bool | int | float | str]:
    """What distinguishes a run in TensorBoard's table, by key: numbers, and text for the rest."""
    flat = flatten(run.config)
    values = {key: flat[key] for key in HYPERPARAMETERS if flat.get(key) is not None} | dict(run.swept)
    return {key: value if isinstance(value, bool | int | float) else str(value) for key, value in values.items()}
