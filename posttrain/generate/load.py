"""From what a person names (a run, a checkpoint, an adapter, a model) to a Hugging Face directory, and its model."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint import directories
from posttrain.config import frozen, targets
from posttrain.config.containers import as_dict
from posttrain.config.instantiate import built
from posttrain.data.templates import ChatTemplate
from posttrain.errors import NoSuchModel, RunFailed, UserError
from posttrain.models import HFModel
from posttrain.models.headers import read_headers
from posttrain.models.hf import DEMO
from posttrain.models.hf_adapter import CONFIG, check_against, is_adapter, read_adapter
from posttrain.utils import rundir
from posttrain.utils.stop import FULL_ERROR
from posttrain.utils.user_paths import expand_home

NEARBY = 5  # runs and models that are named beside a mistyped one
SWEEP = "multirun.yaml"  # Hydra's, in a sweep's directory
SHIPPED = "posttrain.models.HFModel"
WHAT = "run directory, checkpoint, PEFT adapter, Hugging Face directory or hub id"


@contextmanager
def open_export(what: str) -> Iterator[Path]:
    """The Hugging Face directory that `what` means, checked; a checkpoint is exported, and removed at the end.

    Args:
        what: a run directory, its `adapter` or `hf`, its `checkpoints` or one `iter_*`, a PEFT or Hugging Face
            directory, a hub id, or `demo:smollm2_135m`.

    Raises:
        UserError: there is no such thing, it is half written, or its parts are of different models.
    """
    path = expand_home(what)
    import_family(path)
    if not path.is_dir():
        is_hub_id = what.count("/") == 1 and not what.startswith((".", "/", "~")) and not path.parent.is_dir()
        if not is_hub_id and not what.startswith(DEMO):
            raise UserError(f"{what}: no such directory{nearby(path)}; give a {WHAT}")
        try:
            directory = HFModel(path=what).directory
        except NoSuchModel as error:
            raise UserError(f"{what}: {error.reason}{nearby(path)}; give a {WHAT}") from None
        yield directory
        return
    refuse_sweep(path)
    export = export_of(path)
    if export is not None:
        check_export(export)
        yield export
        return
    checkpoint = directories.NAME.fullmatch(path.name) or directories.checkpoints(path)
    if not checkpoint and rundir.is_folder(path, "checkpoints"):
        checkpoint = directories.checkpoints(path / "checkpoints")
    if not checkpoint:
        if rundir.is_file(path, "config.yaml"):
            raise UserError(
                f"{path}: this run has no finished export or checkpoint (see its status.json); run it again"
            )
        raise UserError(f"{path}: is not a {WHAT}")
    with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch:
        yield export_checkpoint(path, Path(scratch) / "model")


def refuse_sweep(path: Path) -> None:
    """Refuse the directory of a sweep, with what is meant.

    Raises:
        UserError: it is one.
    """
    if not path.is_dir() or not rundir.is_file(path, SWEEP):
        return
    advice = f"give one of its trials: {path}/NAME"
    if (path / "best").is_symlink():  # to an export
        advice = f"its best trial is {path / os.readlink(path / 'best')}".removesuffix("/adapter").removesuffix("/hf")
    raise UserError(f"{path}: is a sweep; {advice}")


def import_family(path: Path) -> None:
    """Import the user's own class of the model that a run was of, which makes its family known.

    Args:
        path: the run, or an export or a checkpoint in it; of anything else nothing is imported.

    Raises:
        UserError: the class is not allowed.
    """
    run = run_of(path)
    if run is None:
        return
    model = frozen.read(run).get("model")
    if isinstance(model, DictConfig) and model.get("_target_") not in (None, SHIPPED):
        targets.check(OmegaConf.create({"model": model}))  # before anything is imported
        built(model)


def nearby(path: Path) -> str:
    """Name the runs and models beside the first folder of `path` that isn't there, most like it first."""
    folder = path.parent
    missing = path.name
    while not folder.is_dir():
        missing = folder.name
        folder = folder.parent
    found = []
    for entry in folder.iterdir():
        if any((entry / name).is_file() for name in ("status.json", "config.json", CONFIG)):
            found.append(entry.name)
    if not found:
        return ""
    found.sort(key=lambda name: (-SequenceMatcher(None, name, missing).ratio(), name))
    return f"; in {folder} there are: {', '.join(found[:NEARBY])}"


def run_of(what: str | Path) -> Path | None:
    """The run directory that `what` is, or lies in as an export or a checkpoint; None: it is of none."""
    path = expand_home(what).absolute()
    for folder in (path, *path.parents[:2]):
        if rundir.is_file(folder, "config.yaml"):
            return folder
    return None


def template_of(what: str) -> ChatTemplate:
    """How the tokenizer's own chat template is used: with the settings of the run that `what` is of, if it is of one.

    An export holds the text of the run's template as its own; what the run gave that text lies in the run alone.

    Raises:
        UserError: the run's configuration can't be read.
    """
    run = run_of(what)
    trained = frozen.read(run).get("template") if run else None
    if not isinstance(trained, DictConfig):
        return ChatTemplate(require_stop=False)
    settings = as_dict(trained)
    return ChatTemplate(
        require_stop=False,
        variables=settings.get("variables") or {},
        parse_content=settings.get("parse_content") is True,
        stop_tokens=settings.get("stop_tokens") or (),
    )


def export_of(path: Path) -> Path | None:
    """`path` itself, or a run's export, if it is a PEFT or Hugging Face directory; None otherwise."""
    for name in (".", "adapter", "hf"):
        candidate = path / name
        if name != ".":
            rundir.check_tree(path, name)
        if is_adapter(candidate) or (candidate / "config.json").is_file():
            return candidate
    return None


def check_export(directory: Path) -> None:
    """Read the headers of a PEFT or Hugging Face directory, and of an adapter's base.

    Raises:
        UserError: something is missing, cut short, or of another model.
    """
    model = HFModel(path=str(directory))
    base = model.directory  # of an adapter, else `directory`; checked
    if model.adapter:
        _, pairs, tensors = read_adapter(directory)
        check_against(read_headers(base), pairs, tensors)


def export_checkpoint(checkpoint: Path, out: Path) -> Path:
    """Export a Megatron checkpoint to `out`, in a process of its own: Megatron is needed for nothing else here.

    Raises:
        UserError: as `python -m posttrain.convert export` says it.
        RunFailed: it ended in another way.
    """
    print(f"exporting the checkpoint of {checkpoint}", file=sys.stderr, flush=True)
    words = [f"checkpoint={quote(checkpoint.absolute())}", f"convert.out={quote(out)}"]
    command = [sys.executable, "-m", "posttrain.convert", "export", *words]
    environment = {key: value for key, value in os.environ.items() if key != FULL_ERROR}  # its one line is enough
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        message = (done.stderr.strip() or "the export failed").removeprefix("posttrain: ")
        if done.returncode == UserError.exit_code:
            raise UserError(message)
        raise RunFailed(message)
    return out


def quote(path: Path) -> str:
    """A path as Hydra's grammar takes it whole: a trial's has `=` and `,` in it."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
