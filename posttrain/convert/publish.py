"""A directory that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import UserError


def check_free(out: Path, overwrite: bool) -> None:
    """Raise a UserError where `out` exists and must not be replaced, or is not a directory of its own."""
    if out.exists() and not out.is_dir():
        raise UserError(f"convert.out={out}: is not a directory; choose another")
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(f"convert.out={out}: this command runs in it, and it would be replaced; name a new directory")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise UserError(f"convert.out={out}: already exists; choose another, or add convert.overwrite=true")


def check_apart(out: Path, source: Path) -> None:
    """Raise a UserError where `source`, which is read, is `out` or lies in it: it would be replaced by the result."""
    if source.exists() and source.resolve().is_relative_to(out.resolve()):  # the name of a hub's model is no path
        raise UserError(f"convert.out={out}: {source}, which is read, would be replaced; choose another directory")


@contextmanager
def publishing(out: Path, overwrite: bool = False, first: bool = True) -> Iterator[Path]:
    """Yield a hidden sibling of `out` to write into; renamed to `out` at the end, removed after an error.

    Args:
        out: the directory to appear.
        overwrite: replace one that is there.
        first: False on processes that write nothing: they get the path and leave the disk alone.
    """
    scratch = out.with_name(f".{out.name}.partial")
    if not first:
        yield scratch
        return
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove(scratch)  # of a process that was killed
    scratch.mkdir()
    try:
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        for file in filter(Path.is_file, scratch.rglob("*")):
            file.chmod(0o666 & ~umask)  # safetensors lets the owner alone read
        old = out.with_name(f".{out.name}.old")
        remove(old)
        if os.path.lexists(out):
            os.replace(out, old)
        os.replace(scratch, out)
        remove(old)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a folder, as far as the system lets it, or a link or file of its name, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
