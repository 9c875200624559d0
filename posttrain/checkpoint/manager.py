"""Megatron-Bridge's checkpoint manager: saves that are whole or absent, loads that verify the checkpoint first."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    _generate_model_state_dict,
    apply_peft_adapter_filter_to_state_dict,
    get_rng_state,
    is_empty_async_queue,
    preprocess_fsdp_dtensor_state_dict,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from omegaconf import DictConfig
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place

from posttrain.checkpoint import Checkpoint, directories, pickles, progress, resume
from posttrain.checkpoint import fingerprints as inputs
from posttrain.checkpoint.progress import Progress
from posttrain.config import frozen
from posttrain.errors import UserError
from posttrain.models.fully_sharded import follow_shards, wrappers_of
from posttrain.utils import rundir
from posttrain.utils.atomic_files import write_text
from posttrain.utils.heartbeat import Heartbeat

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.state import GlobalState

log = logging.getLogger(__name__)


@dataclass
class SavedRun:
    """What checkpoints need of the run that they are of.

    Attributes:
        config: the frozen configuration.
        steps: of the whole run.
        rows: packed sequences of an epoch.
        digests: of what the configuration names, as the command found it.
        total_limit: how many of the newest checkpoints stay; None: all but temporary ones.
        keep_best: whether the one with the lowest validation loss stays as well.
        progress: written to each checkpoint, read from the one that is loaded.
        heartbeat: signs of life for the launcher.
        format: of Megatron-Bridge's: torch_dist, or fsdp_dtensor.
        load_base: fills the model's chunks with the weights before training.
        inputs: () -> digests of what the run reads besides its configuration.
        before_save: called on every process before a save; brings `progress` up to date.
        saved: told on the first process of each checkpoint, once it has its name: the step and the directory.
    """

    config: DictConfig
    steps: int
    rows: int
    digests: dict[str, str]
    total_limit: int | None
    keep_best: bool
    progress: Progress
    heartbeat: Heartbeat
    format: str
    load_base: Callable[[list[torch.nn.Module]], object]
    inputs: Callable[[], dict[str, str]]
    before_save: Callable[[], None]
    saved: Callable[[int, Path], None]


@dataclass
class RunCheckpointConfig(CheckpointConfig):
    """Megatron-Bridge's checkpoint configuration, from which it makes the manager, with the run that is saved."""

    saved_run: InitVar[SavedRun | None] = None  # no field: Megatron-Bridge writes those to run_config.yaml

    def __post_init__(self, saved_run: SavedRun | None) -> None:
        self.run = saved_run

    @classmethod
    def from_group(
        cls, group: Checkpoint, directory: Path, base: Path, resume_from: Path | None, run: SavedRun
    ) -> Self:
        """What the config group `checkpoint` means to Megatron-Bridge.

        Args:
            group: when is saved, and what.
            directory: where this run's checkpoints go.
            base: Hugging Face directory of the weights before training.
            resume_from: the checkpoint to resume from.
            run: what the manager needs of the run.
        """
        register_allowed_target_prefix("posttrain.checkpoint.manager")
        return cls(
            pretrained_checkpoint=str(base),
            save=str(directory) if group.save else None,
            load=str(resume_from) if resume_from else None,
            save_interval=None,  # the run's callback says after which steps: train/saves.py
            most_recent_k=-1,  # the manager removes old ones
            save_optim=group.save_optimizer,
            save_rng=group.save_optimizer,
            async_save=group.async_save,
            async_strategy="mcore",
            ckpt_format=run.format,
            fully_parallel_save=False,
            custom_manager_class="posttrain.checkpoint.manager.Manager",
            saved_run=run,
        )


class Manager(DefaultCheckpointManager):
    """Writes aside and publishes; loads the newest checkpoint whose every byte is as it was written.

    Args:
        config: made by its `from_group`.
    """

    def __init__(self, config: RunCheckpointConfig) -> None:
        super().__init__(config)
        assert config.run is not None
        self.run = config.run
        self.root = Path(config.save) if config.save else None
        self.rank = torch.distributed.get_rank()
        self.loaded: Path | None = None
        self.pending: int | None = None  # step of the save that is being written in the background
        self.checked: set[Path] = set()  # checkpoints whose content this process has written or compared
        self.damaged: set[str] = set()  # what was said of others
        if self.root:
            rundir.is_folder(self.root.parent, self.root.name)  # refused where it is a link
        if self.root and self.rank == 0:
            directories.clean(self.root)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What this run reads besides its configuration."""
        return self.run.inputs()

    def save(self, ctx: CheckpointSaveContext, callback_manager: "CallbackManager | None") -> None:
        """Save; a collective call. In the background it is published by a later `finalize_async_saves`.

        Raises:
            UserError: the disk refused it; earlier checkpoints are as they were.
        """
        assert self.root is not None  # else Megatron doesn't save
        step = ctx.state.train_state.step
        if self.loaded == directories.directory(self.root, step):
            return  # the run had ended when it was started again
        self.finalize_async_saves(ctx.state, blocking=True)
        partial = directories.directory(self.root / directories.PARTIAL, step)
        self.run.heartbeat.begin()
        self.run.before_save()
        try:
            self.checkpoint_config.save = str(partial.parent)
            super().save(ctx, callback_manager)
            if self.rank == 0:
                self.run.progress.inputs = self.inputs
                self.run.progress.rows = self.run.rows
                self.run.progress.digests = self.run.digests
                self.run.progress.write(partial)
                write_text(partial / resume.CONFIG, frozen.text(self.run.config))
            self.pending = step
            if not self.checkpoint_config.async_save:
                self._publish()
        except (Exception, CheckpointException) as error:
            _refuse(error, self.root, self.rank == 0)
        finally:
            self.checkpoint_config.save = str(self.root)
            self.run.heartbeat.end()

    def finalize_async_saves(self, state: "GlobalState", blocking: bool = False, terminate: bool = False) -> None:
        """Publish the save in the background if it is written; a collective call."""
        super().finalize_async_saves(state, blocking, terminate)
        if self.pending is not None and (blocking or is_empty_async_queue(state)):
            self._publish()

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load the newest whole checkpoint, or the weights before training; a collective call.

        Raises:
            UserError: no checkpoint is whole, it is further on than this run shall go, or it was made with other rows
                or weights than are there now.
        """
        config = self.checkpoint_config
        if config.load is None:
            return super().load(ctx)
        where = Path(config.load).parent
        found, skipped = from_first_rank(lambda: directories.newest(where, hashes=True))
        for line in skipped:
            log.warning("skipped %s", line)
        if found is None:
            raise UserError(resume.none_left(where, skipped))
        resume.check_steps(found, self.run.steps, self.run.config)
        config.load = str(found)
        self.loaded = found
        self.checked.add(found)
        self.damaged.update(skipped)
        self.run.progress.skipped = skipped
        self.run.progress.read(found)
        now = from_first_rank(lambda: self.inputs)
        inputs.check(self.run.progress.inputs, now, found)
        with pickles.reading(found):
            if config.ckpt_format == "torch_dist":
                config.load_rng = has_random_state(found)
            return super().load(ctx)

    def _publish(self) -> None:
        """Give the written checkpoint its name, point the tracker at it, remove old ones."""
        step = self.pending
        self.pending = None
        assert self.root is not None
        assert step is not None
        if self.rank == 0:
            written = directories.finish(self.root, step)
            self.run.saved(step, written)
            self._remove_old(written)
        torch.distributed.barrier()

    def _remove_old(self, written: Path) -> None:
        """Leave as many checkpoints as the run asks for, `written` among them; damaged ones are named once."""
        best = progress.best(written.parent) if self.run.keep_best else None
        damaged = directories.prune(written, self.run.total_limit, self.checked, best, progress.is_temporary)
        for line in damaged:
            if line not in self.damaged:
                log.warning("not counted among the checkpoints that are kept: %s", line)
        self.damaged.update(damaged)


def from_first_rank[T](compute: Callable[[], T]) -> T:
    """What the first rank, and no other, computes; a collective call."""
    if torch.distributed.get_world_size() == 1:
        return compute()
    box: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        box = [compute()]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def has_random_state(checkpoint: Path) -> bool:
    """Whether a checkpoint of the format torch_dist has the state of this process's random generators.

    With expert parallelism Megatron-Bridge saves that of every process, else that of one data-parallel process, under
    other names. So it is there only where both runs have as many such processes, or neither has expert parallelism.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    wanted = get_rng_state(data_parallel_random_init=False, pg_collection=groups)
    assert isinstance(wanted, ShardedObject)
    saved = FileSystemReader(checkpoint).read_metadata()
    return wanted.unique_key in saved.state_dict_metadata


def load_weights(parts: list[torch.nn.Module], peft: "PEFT | None", checkpoint: Path) -> None:
    """Load a checkpoint's weights, and nothing else of it, into the live model that it was saved from; collective.

    Args:
        parts: the model's chunks of this process.
        peft: its adapter's, which alone is in the checkpoint; None: all weights are.
        checkpoint: whose content has been compared with what was written.
    """
    if wrappers_of(parts):
        load_shards(parts, peft, checkpoint)
        return
    plain = unwrap_model(parts)
    sharded = _generate_model_state_dict(plain, {})
    if peft is not None:
        sharded = apply_peft_adapter_filter_to_state_dict(sharded, peft)
    with pickles.reading(checkpoint):
        state = dist_checkpointing.load(sharded, str(checkpoint))
    for name, part in zip(sharded, plain, strict=True):
        part.load_state_dict(state[name], strict=False)  # frozen weights and extra states are not among them


def load_shards(parts: list[torch.nn.Module], peft: "PEFT | None", checkpoint: Path) -> None:
    """As `load_weights`, of a model under Megatron-FSDP: its shards are filled where they lie."""
    (wrapper,) = wrappers_of(parts)
    state = _generate_model_state_dict([wrapper], {}, "fsdp_dtensor")
    if peft is not None:
        state = apply_peft_adapter_filter_to_state_dict(state, peft)
    state = preprocess_fsdp_dtensor_state_dict(None, state, wrapper)
    with pickles.reading(checkpoint):
        load_in_place(state, checkpoint_id=checkpoint)
    follow_shards(parts)


def _refuse(error: BaseException, root: Path, is_first: bool) -> NoReturn:
    """Raise `error`, as the user's where the disk is at fault.

    Args:
        error: of a save.
        root: of the checkpoints.
        is_first: whether this process removes what was begun.
    """
    system = None
    writer = None  # Megatron's writers keep the system's error to themselves; it is in the log.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
            system = system or cause
        if isinstance(cause, CheckpointException):
            writer = writer or cause
        cause = cause.__cause__ or cause.__context__
    if system is None and writer is None:
        raise error
    why = system or "a shard was not written to its end"
    if is_first:
        shutil.rmtree(root / directories.PARTIAL, ignore_errors=True)
    kept, _ = directories.newest(root)
    stays = "there is no earlier checkpoint"
    if kept:
        stays = f"{kept} stays; the same command resumes from it"
    free = shutil.disk_usage(root).free / 1e9
    raise UserError(f"checkpoint: {root} can't be written: {why} ({free:.1f} GB are free there); {stays}") from error
