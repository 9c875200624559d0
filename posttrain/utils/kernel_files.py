"""Files that the kernel makes up while they are read: a process' environment, settings, devices. None is data."""

from pathlib import Path

from posttrain.errors import UserError

ROOTS = (Path("/proc"), Path("/sys"), Path("/dev"))
MEMORY = Path("/dev/shm")  # files of anybody's, kept in memory


def refuse(path: Path, key: str = "") -> None:
    """Refuse a path that leads to such a file or folder, by links as well.

    Args:
        path: there need be nothing.
        key: the configuration key that it is from, for the error.

    Raises:
        UserError: naming the path.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a zero byte: who opens it will say so
        return
    for root in ROOTS:
        if target.is_relative_to(root) and not target.is_relative_to(MEMORY):
            named = f"{key}={path}" if key else str(path)
            raise UserError(f"{named}: lies in {root}, whose files are the kernel's and devices; give a file of data")
