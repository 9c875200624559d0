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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from posttrain.errors import UserError
from posttrain.utils import rundir
from posttrain.utils.atomic_files import ASIDE, write_bytes, write_json, write_text

PARTIAL, SEAL = ".partial", "complete.json"
NAME = re.compile(r"iter_(\d{7,})")
REMOVING = re.compile(rf"\.removing-{NAME.pattern}")
TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")


def directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies; Megatron's naming."""
    return root / f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step after which `checkpoint` was saved."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def checkpoints(root: Path) -> list[Path]:
    """Published checkpoints below `root`, whole or damaged or links (see `problem`), the newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def finish(root: Path, step: int, keep: int | None = None) -> None:
    """Publish what was written in `root`/.partial, point Megatron's trackers at it, keep the `keep` newest.

    Raises:
        OSError: the disk refused; the checkpoints before are as they were.
    """
    final = directory(root, step)
    publish(directory(root / PARTIAL, step), final)
    # For Megatron's own tools; this project looks at the directories.
    state, iteration = TRACKERS
    write_bytes(root / state, (final / "train_state.pt").read_bytes())
    write_text(root / iteration, str(step))
    if keep is not None:
        prune(root, keep)
    shutil.rmtree(root / PARTIAL, ignore_errors=True)


def publish(partial: Path, final: Path) -> None:
    """Seal `partial` and give it its name; after this returns it survives a power cut.

    A directory that has the name already is replaced: the caller knows it to be damaged.

    Raises:
        OSError: the disk refused; `final` is as it was.
    """
    paths = _files(partial)
    for path in [*paths, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _flush(path)
    write_json(partial / SEAL, {"version": 1, "files": _hashes(partial, paths)})
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
        sealed = rundir.read_json(checkpoint, SEAL)["files"]
        wanted = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in sealed.items()}
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except UserError as error:  # a link, a pipe, a device
        return str(error).removeprefix(str(checkpoint)).lstrip("/: ")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} can't be read"
    if not wanted or any(Path(name).is_absolute() or ".." in Path(name).parts for name in wanted):
        return f"{SEAL} can't be read"
    for name, (size, _) in wanted.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if hashes:
        try:
            found = _hashes(checkpoint, [checkpoint / name for name in wanted])
        except OSError as error:
            return f"can't be read: {error}"
        changed = [name for name, (_, digest) in wanted.items() if found[name]["sha256"] != digest]
        if changed:
            return f"the content of {changed[0]} has changed"
    return None


def newest(root: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what was passed over on the way, in words."""
    skipped = []
    for checkpoint in checkpoints(root):
        why = problem(checkpoint, hashes)
        if why is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: {why}")
    return None, skipped


def prune(root: Path, keep: int) -> None:
    """Remove whole checkpoints beyond the `keep` newest; damaged ones neither count nor go."""
    for checkpoint in [path for path in checkpoints(root) if problem(path) is None][keep:]:
        remove(checkpoint)


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


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hashes(folder: Path, paths: list[Path]) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file, in threads: hashing lets go of the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_sha256, paths))
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


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
