"""Directories in the user's cache that are built once, whole or not at all, whoever else builds at the same time."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """Return `cache_dir`, or $POSTTRAIN_CACHE, $XDG_CACHE_HOME/posttrain, ~/.cache/posttrain: the first that is set."""
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("POSTTRAIN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the directory `target`; if it is not there, let `build` fill a scratch directory that is renamed to it.

    A directory under its final name is therefore always complete. Other processes wait for the builder's lock and then
    find the result. A builder that was killed leaves scratch only, which the next builder of this target removes.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "ab") as lock:  # never emptied: it may be a link
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        for left in target.parent.glob(f".{target.name}.tmp*"):
            shutil.rmtree(left)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp", dir=target.parent))
        try:
            scratch.chmod(0o755)
            build(scratch)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target
