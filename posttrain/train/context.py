"""What every part of a run may need to know of it. Built once, by posttrain.train.trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from posttrain.checkpoint import Checkpoint
from posttrain.checkpoint.progress import Progress
from posttrain.config.schema import TrainerSchema
from posttrain.data.templates import ChatTemplate
from posttrain.data.training_data import Splits, TrainingData
from posttrain.models import HFModel
from posttrain.objectives import Objective
from posttrain.patches import Platform
from posttrain.peft.adapters import LoRA
from posttrain.spec.epochs import Epoch
from posttrain.spec.run_spec import RunSpec
from posttrain.spec.schedule import Schedule, schedule_of
from posttrain.train.console import RankScreen
from posttrain.train.parallelism import Parallelism
from posttrain.train.precision import Precision
from posttrain.train.startup_clock import StartupClock
from posttrain.train.trackers import Tracker
from posttrain.utils.heartbeat import Heartbeat

if TYPE_CHECKING:
    from megatron.bridge.training.config import OptimizerConfig, SchedulerConfig
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Groups:
    """The objects that the config groups are instantiated into.

    Attributes:
        peft: None: all weights are trained.
        optimizer, scheduler: Megatron-Bridge's own configurations.
        trackers: where metrics go besides metrics.jsonl.
    """

    model: HFModel
    peft: LoRA | None
    objective: Objective
    data: TrainingData
    template: ChatTemplate
    parallelism: Parallelism
    optimizer: "OptimizerConfig"
    scheduler: "SchedulerConfig"
    precision: Precision
    checkpoint: Checkpoint
    trackers: list[Tracker]


@dataclass(frozen=True)
class RunContext:
    """One process's run.

    Attributes:
        config: the frozen configuration.
        settings: its group `trainer`.
        groups: the objects of the other groups.
        spec: every decision that follows from the configuration and the machine.
        platform: device, and whether Transformer Engine is there.
        run_dir: where everything is written.
        rank, world: of this process, and how many there are.
        tokenizer: the model's, with the tokens that the template adds.
        splits: the packed data.
        progress: totals over all parts of the run, kept in its checkpoints.
        heartbeat: signs of life for the launcher.
        screen: what the person at the terminal sees.
        clock: of the run's start.
    """

    config: DictConfig
    settings: TrainerSchema
    groups: Groups
    spec: RunSpec
    platform: Platform
    run_dir: Path
    rank: int
    world: int
    tokenizer: "PreTrainedTokenizerFast"
    splits: Splits
    progress: Progress
    heartbeat: Heartbeat
    screen: RankScreen
    clock: StartupClock

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on GPUs."""
        return self.platform.device == "cuda"

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and talks to people."""
        return self.rank == 0

    @property
    def exports_best(self) -> bool:
        """Whether the weights of the lowest validation loss are exported, not the last ones."""
        return self.settings.export == "best"

    @property
    def keeps_best(self) -> bool:
        """Whether each new lowest validation loss is saved, and the lowest kept."""
        return self.groups.checkpoint.keep_best or self.exports_best

    @property
    def loader_workers(self) -> int:
        """Processes that read ahead: where there is a GPU to keep busy."""
        return self.settings.num_workers if self.on_gpu else 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.spec.steps(len(self.splits.train))
        assert steps is not None  # it is, where rows are not counted
        return steps

    @property
    def epoch(self) -> Epoch:
        """The steps of one pass over the training rows."""
        return self.spec.epoch(len(self.splits.train))

    @property
    def schedule(self) -> Schedule:
        """The learning rate of every step."""
        return schedule_of(self.config, self.steps)

    @property
    def validation_rows(self) -> int:
        """Packed sequences of the validation split, 0 without one."""
        return len(self.splits.validation or ())

    @property
    def validation_batch_size(self) -> int:
        """Packed sequences of a validation batch."""
        return self.spec.validation_batch(self.validation_rows)

    @property
    def validation_steps(self) -> int:
        """Global batches of one validation."""
        return self.spec.validation_steps(self.validation_rows)
