"""From what a person names (a run, a checkpoint, an adapter, a model) to a Hugging Face directory, and its model."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint import directories
from posttrain.config import frozen, targets
from posttrain.config.instantiate import built
from posttrain.errors import RunFailed, UserError
from posttrain.models import HFModel
from posttrain.models.headers import read_headers
from posttrain.models.hf import DEMO
from posttrain.models.hf_adapter import check_against, is_adapter, read_adapter
from posttrain.utils import rundir
from posttrain.utils.stop import FULL_ERROR

if TYPE_CHECKING:
    pass

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
    path = Path(what).expanduser()
    import_family(path)
    if not path.is_dir():
        is_hub_id = what.count("/") == 1 and not what.startswith((".", "/", "~")) and not path.parent.is_dir()
        if is_hub_id or what.startswith(DEMO):
            yield HFModel(path=what).directory
            return
        raise UserError(f"{what}: no such directory; give a {WHAT}")
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


def import_family(path: Path) -> None:
    """Import the user's own class of the model that a run was of, which makes its family known.

    Args:
        path: the run, or an export or a checkpoint in it; of anything else nothing is imported.

    Raises:
        UserError: the class is not allowed.
    """
    for folder in (path, *path.absolute().parents[:2]):
        if rundir.is_file(folder, "config.yaml"):
            model = frozen.read(folder).get("model")
            if isinstance(model, DictConfig) and model.get("_target_") not in (None, SHIPPED):
                targets.check(OmegaConf.create({"model": model}))  # before anything is imported
                built(model)
            return


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
