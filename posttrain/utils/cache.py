"""Directories in the user's cache that are built once, whole or not at all, whoever else builds at the same time."""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from posttrain.errors import UserError

log = logging.getLogger(__name__)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """Return `cache_dir`, or $POSTTRAIN_CACHE, $XDG_CACHE_HOME/posttrain, ~/.cache/posttrain: the first that is set."""
    if cache_dir is not None:
        return Path(cache_dir)
    own = os.environ.get("POSTTRAIN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def _no_problem(directory: Path) -> str | None:
    return None


def build_once(
    target: Path, build: Callable[[Path], object], problem: Callable[[Path], str | None] = _no_problem
) -> Path:
    """Return the directory `target`; if it does not exist, let `build` fill a scratch directory that is renamed to it.

    A directory under its final name is therefore always complete. Other processes wait for the builder's lock and then
    find the result. A builder that was killed leaves scratch only, which the next builder of this target removes.

    Args:
        target: in a folder of the cache, ROOT/KIND/NAME.
        build: fills the directory that it is given.
        problem: says what is wrong with an existing directory, which is then built again; None: nothing is.

    Raises:
        UserError: others may write to the cache.
    """
    check_private(target)
    if _is_whole(target, problem):
        return target
    make_private(target.parent)
    with _locked(target):
        if _is_whole(target, problem):
            return target
        for abandoned in target.parent.glob(f".{target.name}.tmp*"):
            shutil.rmtree(abandoned)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp", dir=target.parent))
        try:
            scratch.chmod(0o755)
            build(scratch)
            if target.is_dir():
                log.warning("%s is damaged (%s) and was made again", target, problem(target))
                target.rename(f"{scratch}.damaged")
            scratch.rename(target)
            shutil.rmtree(f"{scratch}.damaged", ignore_errors=True)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target


def discard(target: Path, inode: int) -> None:
    """Remove the directory `target`, unless it is another one by now: others may have built it again.

    Args:
        target: see `build_once`.
        inode: of the directory that is meant.
    """
    with _locked(target):
        if target.is_dir() and target.stat().st_ino == inode:
            aside = target.with_name(f".{target.name}.tmp{os.urandom(4).hex()}")  # as scratch is called: removed later
            target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """With the lock of those who build or remove `target`; the folder that it lies in must be there."""
    with open(target.with_name(f".{target.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_private(target: Path) -> None:
    """Refuse a directory of the cache that somebody else may change: what is in it is trusted from then on.

    Args:
        target: ROOT/KIND/NAME; it and the two above are looked at, as far as they are there.

    Raises:
        UserError: one of them belongs to another user, or others may write to it.
    """
    for directory in (target.parent.parent, target.parent, target):
        try:
            status = directory.stat()
        except FileNotFoundError:
            continue
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            problem = "others may write to it"
        elif status.st_uid not in (os.geteuid(), 0):
            problem = f"it belongs to the user with the id {status.st_uid}"
        else:
            continue
        raise UserError(
            f"{directory}: {problem}, and a cache is trusted; take that right away (chmod go-w), or choose a directory "
            "of your own: cache_dir=DIR or POSTTRAIN_CACHE=DIR"
        )


def make_private(directory: Path) -> None:
    """Make `directory`, and those above it that are missing, for this user alone.

    Raises:
        UserError: one of them can't be made.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path}: a directory for cached data can't be made in {path.parent} ({error.strerror}); choose "
                "another place: cache_dir=DIR or POSTTRAIN_CACHE=DIR"
            ) from None


def _is_whole(target: Path, problem: Callable[[Path], str | None]) -> bool:
    return target.is_dir() and problem(target) is None
