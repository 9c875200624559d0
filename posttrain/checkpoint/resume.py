"""From which checkpoint a run resumes, and whether its configuration allows it. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint import directories
from posttrain.config import frozen
from posttrain.config.instantiate import built
from posttrain.errors import UserError
from posttrain.utils import rundir

CONFIG = "config.yaml"  # the frozen configuration, kept in each checkpoint

# What may differ from the run that saved: nothing here changes which batches are trained on, or how.
HARMLESS = (
    "logger",
    "launch",
    "run",
    "sweep",
    "recipe",
    "checkpoint",
    "cache_dir",
    "parallelism.nproc_per_node",
    "parallelism.sequence_parallel",
    "parallelism.overlap",
    "parallelism.auto",
    "parallelism.memory_gib",
    "peft.fused",
    "peft.recompute_norms",
    "trainer.max_steps",
    "trainer.epochs",
    "trainer.micro_batch_size",
    "trainer.log_interval",
    "trainer.validation_interval",
    "trainer.validation_batches",
    "trainer.early_stopping",
    "trainer.num_generations",
    "trainer.max_new_tokens",
    "trainer.generation_interval",
    "trainer.recompute",
    "trainer.recompute_layers",
    "trainer.offload_layers",
    "trainer.on_nonfinite",
    "trainer.max_rollbacks",
    "trainer.loss_spike_factor",
    "trainer.num_workers",
    "trainer.deterministic",
    "trainer.cuda_graph",
    "trainer.skip_prompt_logits",
    "trainer.profile",
    "trainer.export",
    "trainer.license",
    "trainer.verify",
    "trainer.verify_base",
)
# Megatron's checkpoints are of the whole model, so it may be divided in another way; context parallelism packs other
# rows, and a divided optimizer's state is saved as the model was divided.
LAYOUT = (
    "parallelism.tensor_model_parallel_size",
    "parallelism.pipeline_model_parallel_size",
    "parallelism.expert_model_parallel_size",
)
DIVIDED_STATE = "parallelism.distributed_optimizer"
DIVIDED_OPTIMIZER = (
    DIVIDED_STATE,
    "parallelism.fsdp",
    "optimizer.use_precision_aware_optimizer",
)


def root(cfg: DictConfig, run_dir: Path) -> Path | None:
    """The checkpoints to resume from: this run's own, else those that run.resume names, else None.

    Raises:
        UserError: the folder of those that run.resume names is a link.
    """
    own = run_dir / "checkpoints"
    if directories.checkpoints(own):
        return own
    if cfg.run.resume in ("auto", "never"):
        return None
    rundir.is_folder(Path(cfg.run.resume), "checkpoints")  # refused where it is a link
    return Path(cfg.run.resume) / "checkpoints"


def find(cfg: DictConfig, run_dir: Path) -> Path | None:
    """The newest checkpoint that looks whole by names and sizes; its content is checked when it is loaded.

    Raises:
        UserError: there are checkpoints, and none of them is whole; or the named run has none.
    """
    where = root(cfg, run_dir)
    if where is None:
        return None
    checkpoint, skipped = directories.newest(where)
    if checkpoint is None and skipped:
        raise UserError(none_left(where, skipped))
    if checkpoint is None:
        raise UserError(f"run.resume={cfg.run.resume}: there is no finished checkpoint in {where}")
    return checkpoint


def none_left(where: Path, skipped: list[str]) -> str:
    """The message for a run whose checkpoints are all damaged."""
    listed = "".join(f"\n  {line}" for line in skipped)
    return f"{where}: no checkpoint is whole; choose another hydra.run.dir to start from the beginning{listed}"


def find_allowed(cfg: DictConfig, run_dir: Path) -> Path | None:
    """As `find`, where a run may resume from a checkpoint at all.

    Raises:
        UserError: as `find`; or run.resume=never and there is a checkpoint, or it has no optimizer's state.
    """
    if cfg.run.resume == "never" and directories.checkpoints(run_dir / "checkpoints"):
        raise UserError(f"run.resume=never: {run_dir} has a checkpoint; choose another hydra.run.dir or resume=auto")
    checkpoint = find(cfg, run_dir)
    if checkpoint is None:
        return None
    if OmegaConf.select(frozen.read(checkpoint, CONFIG), "checkpoint.save_optimizer") is False:
        raise UserError(f"{checkpoint}: was saved with checkpoint.save_optimizer=false, a run can't resume from it")
    return checkpoint


def check_configuration(checkpoint: Path, before: DictConfig, cfg: DictConfig, contents: Mapping[str, bool]) -> None:
    """Refuse to resume with another configuration.

    Args:
        checkpoint: to resume from.
        before: its configuration.
        cfg: of the run that is to resume.
        contents: of keys that name files, whether the files have the content that they had; such a key may change.

    Raises:
        UserError: they differ in more than may.
    """
    after = OmegaConf.create(frozen.text(cfg))  # as it will be read
    assert isinstance(after, DictConfig)
    changed = {}
    listed = ""
    for key, values in sorted(differences(before, after).items()):
        if contents.get(key):
            continue
        changed[key] = values
        listed += f"\n  {key}: {values[0]} -> {values[1]}"
        if key in contents:
            listed += ", whose content is another"
    if changed:
        if list(changed) == [DIVIDED_STATE]:  # a file of conf/parallelism says it as well
            old, _ = changed[DIVIDED_STATE]
            listed += f"\n  {DIVIDED_STATE}={str(old).lower()} beside the layout keeps it"
        raise UserError(
            f"{checkpoint}: was trained with another configuration; take these changes back, or choose another "
            f"hydra.run.dir{listed}"
        )


def check_steps(checkpoint: Path, steps: int, cfg: DictConfig) -> None:
    """Refuse fewer steps than were trained.

    Args:
        checkpoint: to resume from.
        steps: of the run, in all.
        cfg: its configuration, which says so.

    Raises:
        UserError: the checkpoint has more.
    """
    trained = directories.step_of(checkpoint)
    if trained > steps:
        setting = f"trainer.max_steps={cfg.trainer.max_steps}"
        if cfg.trainer.max_steps is None:
            setting = f"trainer.epochs={cfg.trainer.epochs or 1:g}"
        raise UserError(
            f"{setting}: {steps} steps are asked for, and {checkpoint} has been trained for {trained}; ask for more, "
            "or choose another hydra.run.dir"
        )


def differences(before: DictConfig, after: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Key path -> (old, new) of what differs and isn't harmless; keys that one of them lacks count as None."""
    old = _leaves(before)
    new = _leaves(after)
    harmless: tuple[str, ...] = HARMLESS
    if not any(old.get(key) or new.get(key) for key in DIVIDED_OPTIMIZER):
        harmless += LAYOUT
    if built(after.objective).template(built(after.template)) is None:  # none is rendered with
        harmless += ("template",)
    changed = {}
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and not is_within(key, harmless):
            changed[key] = (old.get(key), new.get(key))
    return changed


def is_within(key: str, parts: tuple[str, ...]) -> bool:
    """Whether a key is one of `parts` of the configuration, or in one."""
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _leaves(cfg: DictConfig) -> dict[str, Any]:
    """Key path -> value; lists and empty mappings are values."""
    leaves: dict[str, Any] = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            leaves[path] = node

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return leaves
