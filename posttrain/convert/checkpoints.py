"""Which checkpoint a path means, and what model it is of. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.checkpoint import directories
from posttrain.checkpoint.progress import FILE as progress_file
from posttrain.convert.training_metadata import facts
from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.headers import read_json
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
    peft: Any = None
    template: Any = None
    facts: dict[str, Any] | None = None


def find(path: Path) -> Checkpoint:
    """The newest checkpoint of a run directory or a checkpoints directory, or the one that `path` is.

    Raises:
        UserError: there is none, or it is damaged, or nothing says what model it is of.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint={path}: there is no such directory")
    if directories.NAME.fullmatch(path.name):
        candidates, root = [path], path.parent
    else:
        root = path / "checkpoints" if rundir.is_folder(path, "checkpoints") else path
        candidates = directories.checkpoints(root)
    if not candidates:
        raise UserError(f"checkpoint={path}: no finished checkpoint (iter_*) in it")
    newest = candidates[0]
    if reason := directories.problem(newest):
        raise UserError(f"{newest}: {reason}; it is damaged or half written: name another, checkpoint={root}/iter_...")
    rundir.check_tree(root, HUGGING_FACE)
    if (root / HUGGING_FACE / "config.json").is_file():
        return Checkpoint(newest, HFModel(path=str(root / HUGGING_FACE), random_init=True))
    return of_run(newest, root.parent)


def of_run(directory: Path, run_dir: Path) -> Checkpoint:
    """The checkpoint of a run, which has its frozen configuration."""
    from omegaconf import OmegaConf

    from posttrain.config import frozen, targets
    from posttrain.config.instantiate import built

    config = run_dir / "config.yaml"
    if not rundir.is_file(run_dir, "config.yaml"):
        raise UserError(f"{directory}: neither {config} nor a {HUGGING_FACE} directory says what model it is of")
    cfg = frozen.read(run_dir)
    targets.check(cfg)
    if not all(OmegaConf.is_dict(OmegaConf.select(cfg, group)) for group in ("model", "peft", "template")):
        raise UserError(f"{config}: is not the configuration of a run; it has no `model`, `peft` or `template`")
    model = built(cfg.model)
    if not model.random_init:
        _ = model.directory  # that it is still there, and whole
    peft = built(cfg.peft) if cfg.peft.get("_target_") else None
    template = built(cfg.objective).template(built(cfg.template))
    return Checkpoint(directory, model, peft, template, facts_of(directory, run_dir, cfg))


def facts_of(directory: Path, run_dir: Path, cfg: Any) -> dict[str, Any]:
    """What the run's files say about its training up to this checkpoint."""
    progress, summary = (
        read_json(root / name) if rundir.is_file(root, name) else {}
        for root, name in ((directory, progress_file), (run_dir, "summary.json"))
    )
    step = directories.step_of(directory)
    kept = ("train_loss", "val_loss_before", "supervised_tokens")
    results = {"steps": step, **{key: progress.get(key) for key in kept}}
    if summary.get("steps") == step:
        results["val_loss_after"] = summary.get("val_loss_after")
    return facts(cfg, results, summary.get("data"))
