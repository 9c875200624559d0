"""Which checkpoint a path means, and what model it is of. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.checkpoint import directories, fingerprints, progress
from posttrain.config import frozen, targets
from posttrain.config.instantiate import built
from posttrain.convert.training_metadata import FILE as TRAINING
from posttrain.convert.training_metadata import are_facts, collect_facts
from posttrain.data.templates import ChatTemplate
from posttrain.errors import NoSuchModel, UserError
from posttrain.generate import load
from posttrain.models import HFModel
from posttrain.models.headers import read_json
from posttrain.models.hf_adapter import is_adapter
from posttrain.peft.adapters import LoRA
from posttrain.utils import rundir

# What an imported checkpoint has beside the weights: config.json, tokenizer; what its export needs.
HUGGING_FACE = "huggingface"


@dataclass
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        directory: its iter_* directory.
        model: that it is of.
        peft: the adapter's settings (posttrain.peft); None: it holds a whole model.
        template: that it was trained with (posttrain.data.templates); None: nothing says so.
        facts: about its training (posttrain.convert.training_metadata); None: there was none, as far as is known.
    """

    directory: Path
    model: HFModel
    peft: LoRA | None = None
    template: ChatTemplate | None = None
    facts: dict[str, Any] | None = None


def find(path: Path, base: str | None = None) -> Checkpoint:
    """The newest checkpoint of a run directory or a checkpoints directory, or the one that `path` is.

    Args:
        path: of it.
        base: directory or hub id of the model that its run started from; None: what its configuration names.

    Raises:
        UserError: there is none, or it is damaged, or nothing says what model it is of, or that isn't `base`.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint={path}: there is no such directory")
    load.refuse_sweep(path)
    if directories.NAME.fullmatch(path.name):
        candidates, root = [path], path.parent
    else:
        root = path / "checkpoints" if rundir.is_folder(path, "checkpoints") else path
        candidates = directories.checkpoints(root)
    if not candidates and (is_adapter(path) or (path / "config.json").is_file()):
        raise UserError(f"checkpoint={path}: is in Hugging Face's form already; there is nothing to export")
    if not candidates:
        raise UserError(f"checkpoint={path}: no finished checkpoint (iter_*) in it")
    newest = candidates[0]
    reason = directories.problem(newest)
    if reason:
        raise UserError(f"{newest}: {reason}; it is damaged or half written: name another, checkpoint={root}/iter_...")
    rundir.check_tree(root, HUGGING_FACE)
    if (root / HUGGING_FACE / "config.json").is_file():
        if base is not None:
            raise UserError(f"`convert.base={base}`: {newest} is of no run; it needs no base")
        return Checkpoint(newest, HFModel(path=str(root / HUGGING_FACE), random_init=True))
    return find_in_run(newest, root.parent, base)


def with_step(checkpoint: Path, given: Path) -> str:
    """`RUN/checkpoints/iter_0000020 (step 20, the newest; step 10 has the lowest validation loss)`, for the terminal.

    Args:
        checkpoint: what `find` has found.
        given: what it was asked for.
    """
    text = f"step {directories.step_of(checkpoint)}"
    if checkpoint != given:
        text += ", the newest"
    best = progress.best(checkpoint.parent)
    if best is not None and best != checkpoint:
        text += f"; step {directories.step_of(best)} has the lowest validation loss"
    return f"{checkpoint} ({text})"


def find_in_run(directory: Path, run_dir: Path, base: str | None = None) -> Checkpoint:
    """The checkpoint of a run, which has its frozen configuration."""
    config = run_dir / "config.yaml"
    if not rundir.is_file(run_dir, "config.yaml"):
        raise UserError(f"{directory}: neither {config} nor a {HUGGING_FACE} directory says what model it is of")
    cfg = frozen.read(run_dir)
    targets.check(cfg)
    for group in ("model", "peft", "template"):
        if not OmegaConf.is_dict(OmegaConf.select(cfg, group)):
            raise UserError(f"{config}: is not the configuration of a run; it has no `{group}`")
    if OmegaConf.select(cfg, "parallelism.fsdp"):
        raise UserError(
            f"{directory}: Megatron-FSDP's checkpoints are read by their own run alone; {_instead(run_dir)}"
        )
    model = built(cfg.model)
    peft = built(cfg.peft) if cfg.peft.get("_target_") else None
    check_base(model, directory, base, peft is not None)
    template = built(cfg.objective).template(built(cfg.template))
    return Checkpoint(directory, model, peft, template, read_facts(directory, run_dir, cfg))


def check_base(model: HFModel, directory: Path, base: str | None, adapter: bool) -> None:
    """See that the model that a run started from is there, and whole.

    Args:
        model: of the run's configuration; told where its base is now.
        directory: of the checkpoint.
        base: as for `find`.
        adapter: whether an adapter was trained on its weights.

    Raises:
        UserError: it isn't there, or `base` is another model than the run's.
    """
    if model.random_init:
        return
    if base is not None and model.adapter is not None:
        model.moved_base = base
    elif base is not None:
        model.path = base
    try:
        now = fingerprints.of_model(model.directory, adapter)
    except NoSuchModel as error:
        raise UserError(
            f"{directory}: its base model {model.base}: {error.reason}; say where it is: python -m posttrain.convert "
            f"export {quote(str(directory))} DIR convert.base=BASE"
        ) from None
    before = rundir.object_if_any(directory, progress.FILE).get("inputs")
    if base is not None and isinstance(before, dict) and fingerprints.changed(before, now):
        raise UserError(f"convert.base={base}: is not the model that the run of {directory} started from")


def _instead(run_dir: Path) -> str:
    """What to give instead of a checkpoint that can't be read: the run's export, or how to make it."""
    export = load.export_of(run_dir)
    if export is None:
        return (
            f"have it make an export: python -m posttrain --resume {quote(str(run_dir))} trainer.export=last (or best)"
        )
    results = rundir.object_if_any(export, TRAINING).get("results")
    step = results.get("exported_step") if isinstance(results, dict) else None
    of_step = f", of step {step}" if isinstance(step, int) else ""
    text = f"its export is in Hugging Face's format already: {export}{of_step}"
    command = f"python -m posttrain.generate {quote(str(export))}"
    if is_adapter(export):
        command += f", or as a whole model python -m posttrain.convert merge {quote(str(export))} DIR"
    return f"{text}; ask it: {command}"


def read_facts(directory: Path, run_dir: Path, cfg: DictConfig) -> dict[str, Any]:
    """What the run's files say about its training up to this checkpoint."""
    reached = _read_own(directory, progress.FILE)
    summary = _read_own(run_dir, "summary.json")
    step = directories.step_of(directory)
    results: dict[str, Any] = {"steps": step, "exported_step": step, "val_loss_after": reached.get("val_loss")}
    for key in ("train_loss", "val_loss_before", "supervised_tokens"):
        results[key] = reached.get(key)
    try:
        found = collect_facts(cfg, results, summary.get("data"))
    except (AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException):
        found = {}
    if not are_facts(found):
        raise UserError(f"{run_dir}: its config.yaml and summary.json are not the record of a run's training")
    return found


def _read_own(directory: Path, name: str) -> dict[str, Any]:
    return read_json(directory / name) if rundir.is_file(directory, name) else {}
