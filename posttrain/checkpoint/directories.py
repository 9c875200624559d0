"""Checkpoint directories on disk: published whole, checked before use, removed last.

A checkpoint is written in CHECKPOINTS/.partial, flushed to disk, sealed by `complete.json` with the SHA-256 of every
file, and only then renamed to CHECKPOINTS/iter_NNNNNNN. Whatever ends the process, a directory of that name is whole;
what a disk or a person did to it later shows in the seal. Plain files: no torch here.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from posttrain.errors import UserError
from posttrain.utils import rundir
from posttrain.utils.atomic_files import ASIDE, write_bytes, write_json, write_text

PARTIAL = ".partial"
SEAL = "complete.json"
NAME = re.compile(r"iter_(\d{7,})")
REMOVING = re.compile(rf"\.removing-{NAME.pattern}")
TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")


def directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies; Megatron's naming."""
    return root / f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step after which `checkpoint` was saved."""
    return int(checkpoint.name.removeprefix("iter_"))


def checkpoints(root: Path) -> list[Path]:
    """Published checkpoints below `root`, whole or damaged or links (see `problem`), the newest first."""
    if not root.is_dir():
        return []
    published = [path for path in root.iterdir() if NAME.fullmatch(path.name)]
    return sorted(published, key=step_of, reverse=True)


def holds_checkpoints(path: Path) -> bool:
    """Whether a directory is a checkpoint, or has some as a run directory or as its folder of them has."""
    return bool(NAME.fullmatch(path.name)) or any(map(checkpoints, (path, path / "checkpoints")))


def finish(root: Path, step: int) -> Path:
    """Publish what was written in `root`/.partial and point Megatron's trackers at it; returns the checkpoint.

    Raises:
        OSError: the disk refused; the checkpoints before are as they were.
    """
    final = directory(root, step)
    publish(directory(root / PARTIAL, step), final)
    # For Megatron's own tools; this project looks at the directories.
    state, iteration = TRACKERS
    write_bytes(root / state, (final / "train_state.pt").read_bytes())
    write_text(root / iteration, str(step))
    shutil.rmtree(root / PARTIAL, ignore_errors=True)
    return final


def publish(partial: Path, final: Path) -> None:
    """Seal `partial` and give it its name; after this returns it survives a power cut.

    A directory that has the name already is replaced: the caller knows it to be damaged.

    Raises:
        OSError: the disk refused; `final` is as it was.
    """
    files = []
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            files.append(path)
        if path.is_file() or path.is_dir():
            _flush(path)
    _flush(partial)
    write_json(partial / SEAL, {"version": 1, "files": _hashes(partial, files)})
    _flush(partial)
    if os.path.lexists(final):
        remove(final)
    os.rename(partial, final)
    _flush(final.parent)


def problem(checkpoint: Path, hashes: bool = False) -> str | None:
    """What is wrong with a published checkpoint, or None.

    Args:
        checkpoint: its directory.
        hashes: read every byte as well; without it names and sizes alone.
    """
    try:
        rundir.check_tree(checkpoint.parent, checkpoint.name)
        sealed = {}
        for name, entry in rundir.read_json(checkpoint, SEAL)["files"].items():
            sealed[name] = (int(entry["size"]), str(entry["sha256"]))
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except UserError as error:  # a link, a pipe, a device
        return str(error).removeprefix(str(checkpoint)).lstrip("/: ")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} can't be read"
    if not sealed or any(Path(name).is_absolute() or ".." in Path(name).parts for name in sealed):
        return f"{SEAL} can't be read"
    for name, (size, _) in sealed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if not hashes:
        return None
    try:
        current = _hashes(checkpoint, [checkpoint / name for name in sealed])
    except OSError as error:
        return f"can't be read: {error}"
    for name, (_, digest) in sealed.items():
        if current[name]["sha256"] != digest:
            return f"the content of {name} has changed"
    return None


def newest(root: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and which newer ones were skipped and why."""
    skipped: list[str] = []
    for checkpoint in checkpoints(root):
        damage = problem(checkpoint, hashes)
        if damage is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: {damage}")
    return None, skipped


def prune(
    written: Path,
    keep: int | None,
    checked: set[Path],
    spared: Path | None = None,
    is_temporary: Callable[[Path], bool] = lambda checkpoint: False,
) -> list[str]:
    """Remove the checkpoints before `written` but for the `keep` newest whole ones, of which it is the first.

    What fails its hashes neither counts nor is removed.

    Args:
        written: the checkpoint that was published a moment ago.
        keep: how many to keep, at least 1; None: all but temporary ones.
        checked: those whose content this process has written or checked; what is checked here is added.
        spared: kept in any case.
        is_temporary: whether a checkpoint was only to last until the next.

    Returns:
        The damaged ones that were found, and what is wrong with each.
    """
    damaged = []
    left = 0 if keep is None else keep - 1
    checked.add(written)
    for checkpoint in checkpoints(written.parent):
        if step_of(checkpoint) >= step_of(written):  # a newer one was passed over when this run was resumed
            continue
        if keep is None and not is_temporary(checkpoint):
            continue
        damage = problem(checkpoint, hashes=left > 0 and checkpoint not in checked)
        if damage is not None:
            damaged.append(f"{checkpoint}: {damage}")
        elif left > 0:
            checked.add(checkpoint)
            left -= 1
        elif checkpoint != spared:
            remove(checkpoint)
    return damaged


def clean(root: Path) -> None:
    """Remove what an earlier process of this program left half-written or half-removed, and nothing else."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        aside = ASIDE.fullmatch(path.name)
        being_written = aside is not None and aside["name"] in TRACKERS
        if path.name == PARTIAL or REMOVING.fullmatch(path.name) or being_written:
            _remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no moment does half of one bear its name. Of a link the link is removed."""
    aside = checkpoint.parent / f".removing-{checkpoint.name}"
    _remove(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    _remove(aside, ignore_errors=True)


def _remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a file, a link, or a folder with all that is in it; `shutil.rmtree` follows no link below its own."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(OSError if ignore_errors else FileNotFoundError):
        path.unlink()


def _hashes(folder: Path, paths: list[Path]) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file, in threads: hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_sha256, paths))
    entries: dict[str, dict[str, int | str]] = {}
    for path, digest in zip(paths, digests, strict=True):
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    return entries


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the kernel write a file's, or a directory's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
