"""Files below a run directory, read and written without following links.

A run directory may come from anybody, and a link in it would have a run write, or a report read, somewhere else. Every
name is therefore looked up from the directory's own descriptor, one part at a time; a link, a pipe or a device is
refused by name. The directory itself is named by the user and may be reached through links. No torch here.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from posttrain.errors import UserError
from posttrain.utils.atomic_files import ASIDE, json_text, replace

# What a run writes under these names. What else lies in a run directory is the user's own and is left alone.
LOCK = ".lock"  # locked (flock) by the command whose run uses the directory
FILES = (
    LOCK,
    "config.yaml",
    "inputs.json",
    "metrics.csv",
    "metrics.jsonl",
    "mlflow.json",
    "profile.json",
    "report.html",
    "rollbacks.json",
    "samples.json",
    "samples.jsonl",
    "slurm.json",
    "spec.yaml",
    "status.json",
    "summary.json",
    "trace.json.gz",
    "wandb.json",
)
FOLDERS = (".hydra", ".submitit", "adapter", "base", "checkpoints", "hf", "logs", "mlruns", "tensorboard", "wandb")
# Files of a sweep's own directory.
OF_SWEEP = ("multirun.yaml", "optimization_results.yaml", "report.csv", "report.html")
WRITTEN_INTO = (".hydra", "base", "logs")  # folders whose files have names that anybody can foresee
REPLACED = {  # folder -> files in it that are written aside and then renamed
    ".": re.compile("|".join(map(re.escape, FILES))),
    ".hydra": re.compile(r"(config|hydra|overrides)\.yaml"),
    "logs": re.compile(r"rank\d+\.error\.json"),
}
SHARED_S = 600.0  # age from which a file that was being written is taken for a killed process's by other machines

SMALL = 64 << 20  # most bytes that are read of a configuration or summary
LONG = 2 << 30  # of a file of lines

KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


def read_text(root: Path, name: str, most: int = SMALL, errors: str = "strict") -> str:
    """The UTF-8 text of the file `name` below `root`.

    Args:
        root: the run directory.
        name: with slashes, where it lies deeper.
        most: bytes that it may have.
        errors: what to do with other bytes, as for `bytes.decode`.

    Raises:
        UserError: it is not a plain file, or lies behind a link, or is longer.
        FileNotFoundError: there is none.
    """
    with os.fdopen(_opened(root, name, os.O_RDONLY), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{root / name}: has more than {most >> 20} MiB, which is no such file of a run's")
    return content.decode("utf-8", errors)


def read_json(root: Path, name: str) -> Any:
    """The value in the file `name` below `root`; raises as `read_text`, and ValueError where it isn't JSON."""
    try:
        return json.loads(read_text(root, name))
    except RecursionError:
        raise ValueError(f"{root / name}: nested too deep") from None


def read_object(root: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` below `root`; raises as `read_text`, and a UserError where it is none."""
    try:
        value = read_json(root, name)
    except ValueError as error:
        raise UserError(f"{root / name}: not valid JSON ({error}); remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{root / name}: not valid: expected a JSON object, found {type(value).__name__}; remove it")
    return value


def object_if_any(root: Path, name: str) -> dict[str, Any]:
    """As `read_object`; an empty one where there is no such file, or no JSON object in it."""
    try:
        value = read_json(root, name)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_text(root: Path, name: str, text: str, flush: bool = True) -> None:
    """Replace the file `name` below `root` atomically; its folder must be there.

    Args:
        root: the run directory.
        name: with slashes, where it lies deeper.
        text: of the file from now on.
        flush: see `atomic_files.replace`.

    Raises:
        UserError: its folder lies behind a link, or something else than a file has its name.
    """
    path = PurePath(name)
    with _folder(root, path.parent) as folder, _with_path(root / name):
        with contextlib.suppress(FileNotFoundError):
            _require_file(os.stat(path.name, dir_fd=folder, follow_symlinks=False), root / name)
        replace(folder, path.name, text.encode("utf-8"), flush)


def write_json(root: Path, name: str, value: object) -> None:
    """`write_text` of `atomic_files.json_text`."""
    write_text(root, name, json_text(value))


def append(root: Path, name: str) -> int:
    """A descriptor that writes at the end of the file `name` below `root`, which is made where there is none.

    Raises:
        UserError: as `read_text`; or the file has a second name, which may lie anywhere.
    """
    descriptor = _opened(root, name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{root / name}: is a hard link: writing to it changes another file; put a copy there instead")
    return descriptor


def lock_file(root: Path, name: str) -> int:
    """A descriptor of the file `name` below `root` to lock; nothing is written to it. Raises as `read_text`."""
    return _opened(root, name, os.O_WRONLY | os.O_CREAT)


def is_in_use(root: Path) -> bool:
    """Whether a command on this machine holds the lock of `root`; the system takes it back however that ends."""
    try:
        descriptor = _opened(root, LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def make(root: Path, name: str) -> None:
    """Make the folder `name` below `root` and those above it.

    Raises:
        UserError: something else, or a link, has the name of one of them.
    """
    with _folder(root, PurePath(name), make=True):
        pass


def remove(root: Path, name: str) -> None:
    """Remove the file `name` below `root` if it is there; of a link the link."""
    path = PurePath(name)
    with _folder(root, path.parent) as folder, _with_path(root / name), contextlib.suppress(FileNotFoundError):
        os.unlink(path.name, dir_fd=folder)


def is_file(root: Path, name: str) -> bool:
    """Whether there is a file `name` below `root`. Raises a UserError where it is a link or something else."""
    return _is(root, name, stat.S_IFREG)


def is_folder(root: Path, name: str) -> bool:
    """Whether there is a folder `name` below `root`. Raises a UserError where it is a link or something else."""
    return _is(root, name, stat.S_IFDIR)


def names(root: Path, name: str) -> list[str]:
    """What lies in the folder `name` below `root`, sorted; nothing where there is no such folder."""
    try:
        with _folder(root, PurePath(name)) as folder:
            return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def check(root: Path) -> None:
    """Look at what a run will write to, before it starts.

    Raises:
        UserError: something in `root` has a name of the run's own and is a link, or of another kind.
    """
    for name in FILES:
        is_file(root, name)
    for name in FOLDERS:
        is_folder(root, name)
    for name in WRITTEN_INTO:
        check_tree(root, name)


def check_sweep(root: Path) -> None:
    """As `check` for the directory of a sweep; its trials are run directories.

    Raises:
        UserError: something in `root` has a name of the sweep's own and is a link, or of another kind.
    """
    for name in OF_SWEEP:
        is_file(root, name)
    is_folder(root, ".submitit")


def check_tree(root: Path, name: str) -> None:
    """Refuse a folder `name` below `root` with anything in it, at any depth, that is neither a file nor a folder.

    Raises:
        UserError: in that case.
    """
    if not is_folder(root, name):
        return
    with _folder(root, PurePath(name)) as folder, os.scandir(folder) as entries:
        kinds = {entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) for entry in entries}
    for inner, kind in kinds.items():
        if kind == stat.S_IFDIR:
            check_tree(root, f"{name}/{inner}")
        elif kind != stat.S_IFREG:
            raise _refusal(root / name / inner, kind)


def sweep(root: Path, lone: bool) -> None:
    """Remove what a killed process was writing under the name of one of this run's files.

    Args:
        root: the run directory, locked by this process.
        lone: whether no process of another command writes to it; else young files are left.
    """
    youngest = time.time()
    if not lone:
        youngest -= SHARED_S
    for where, own in REPLACED.items():
        for name in names(root, where):
            aside = ASIDE.fullmatch(name)
            if aside is None or not own.fullmatch(aside["name"]):
                continue
            with _folder(root, PurePath(where)) as folder, contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_mtime <= youngest:
                    os.unlink(name, dir_fd=folder)


def _is(root: Path, name: str, wanted: int) -> bool:
    path = PurePath(name)
    try:
        with _folder(root, path.parent) as folder:
            kind = stat.S_IFMT(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if kind != wanted:
        raise _refusal(root / name, kind)
    return True


def _opened(root: Path, name: str, flags: int) -> int:
    """A descriptor of a plain file below `root`; never waits for a pipe's other end, and touches no device."""
    path = PurePath(name)
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with _folder(root, path.parent) as folder, _with_path(root / name):
        with contextlib.suppress(FileNotFoundError):
            _require_file(os.stat(path.name, dir_fd=folder, follow_symlinks=False), root / name)
        descriptor = os.open(path.name, flags, 0o666, dir_fd=folder)
    try:
        _require_file(
            os.fstat(descriptor), root / name
        )  # what was looked at may have been replaced before it was opened
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _folder(root: Path, name: PurePath, make: bool = False) -> Iterator[int]:
    """A descriptor of the folder `name` below `root`, made where there is none and `make` says so."""
    with _with_path(root):
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = root
        for part in name.parts:
            path = path / part
            with _with_path(path):
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                kind = stat.S_IFMT(os.stat(part, dir_fd=descriptor, follow_symlinks=False).st_mode)
                if kind != stat.S_IFDIR:
                    raise _refusal(path, kind)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _with_path(path: Path) -> Iterator[None]:
    """The system's errors with the whole path, of which a call relative to a descriptor knows the last part alone."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:  # it became a link since it was looked at
            raise _refusal(path, stat.S_IFLNK) from None
        error.filename = str(path)
        error.filename2 = None
        raise


def _require_file(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, stat.S_IFMT(status.st_mode))


def _refusal(path: Path, kind: int) -> UserError:
    kind_name = KINDS.get(kind, "of an unknown kind")
    if kind == stat.S_IFLNK and path.name == "checkpoints":
        advice = "to have them on another disk, let hydra.run.dir lie there; it may itself be a link"
    elif kind == stat.S_IFLNK:
        advice = "none is followed below a run directory; remove it, or put there what it leads to"
    else:
        advice = "a run has something else under this name; remove it, or choose another directory"
    return UserError(f"{path}: is {kind_name}; {advice}")
