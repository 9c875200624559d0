"""Places that a person has named for results, looked at before the work whose results they are for.

What a file system lets one do is not told by its permissions alone: it may be read-only, full, or none for files at all
(/proc). So a folder is made where the results are to be, and removed again.
"""

import errno
import os
import tempfile
from pathlib import Path

from posttrain.errors import UserError

PROBE = ".posttrain."  # how the name of that folder begins


def check_directory(path: Path, key: str, named: Path | None = None) -> None:
    """Refuse a directory that can't be made, or in which nothing can be made.

    Args:
        path: of the directory; there may be none yet, nor any of those above it.
        key: that names it, for the message.
        named: the value of `key`, where that is something in the directory; None: it is the directory.

    Raises:
        UserError: in that case.
    """
    setting = f"{key}={named or path}"
    try:
        existing = _nearest(path)
        if not existing.is_dir():
            raise UserError(f"{setting}: {existing} is not a directory; choose another place")
        _probe(existing)
    except OSError as error:
        raise UserError(f"{setting}: {_problem(error, path)}; choose another place") from None


def check_file(path: Path, key: str) -> None:
    """Refuse a file that can't be written; devices and pipes are left alone.

    Args:
        path: of the file; there may be none yet.
        key: that names it, for the message.

    Raises:
        UserError: it can't be written, or the folder that it is to lie in isn't there.
    """
    setting = f"`{key}={path}`"
    try:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UserError(f"{setting}: there is no such folder; make it, or name another file")
        if path.is_dir():
            raise UserError(f"{setting}: is a directory; name a file")
        if path.is_file():
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        elif not path.exists():
            _probe(folder)
    except OSError as error:
        raise UserError(f"{setting}: {_problem(error, path)}; choose another place") from None


def _nearest(path: Path) -> Path:
    """What there is of a path: itself, or the nearest above it; a link to nothing counts."""
    for place in (path, *path.absolute().parents):
        if os.path.lexists(place):
            place.stat()  # raises where nobody can tell what it is
            return place
    return Path("/")


def _probe(folder: Path) -> None:
    """Make a folder in `folder` and remove it.

    Raises:
        OSError: about `folder`: nothing can be made in it.
    """
    try:
        os.rmdir(tempfile.mkdtemp(prefix=PROBE, dir=folder))
    except OSError as error:
        error.filename = str(folder)
        raise


def _problem(error: OSError, path: Path) -> str:
    """What is wrong with a place, from the system's error about it."""
    place = Path(os.fsdecode(error.filename or path))
    if place.is_symlink() and not place.exists():
        return f"{place} is a link to nothing"
    if error.errno != errno.ENAMETOOLONG and place.is_dir():
        return f"nothing can be written in {place} ({error.strerror})"
    return f"it can't be written ({error.strerror})"
