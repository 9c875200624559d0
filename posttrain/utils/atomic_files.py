"""Small files that are either old or new, never half."""

import contextlib
import json
import math
import os
import re
import stat
from pathlib import Path

from posttrain.errors import UserError
from posttrain.utils import kernel_files

# What a file is called while it is written; see `replace`.
ASIDE = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}")
MOST = 64 << 20  # bytes of a file of settings that is read whole: an index of a million tensors fits


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of settings, which may be anybody's: a pipe would never end, a device fill the memory.

    Raises:
        UserError: it is not a plain file (links are followed), one of the kernel's, or longer than `MOST`.
        OSError: it can't be read.
        UnicodeDecodeError: not UTF-8.
    """
    kernel_files.refuse(path)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path}: is not a plain file")
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise UserError(f"{path}: has more than {MOST >> 20} MiB, too much for such a file")
    return content.decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically: written aside, flushed to disk, renamed. Permissions follow the umask."""
    path = Path(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        replace(folder, path.name, content)
    except OSError as error:
        if error.errno:
            error.filename = str(path)
            error.filename2 = None
        raise
    finally:
        os.close(folder)


def replace(folder: int, name: str, content: bytes, flush: bool = True) -> None:
    """Replace the file `name` in a folder; a link of that name is replaced, not followed.

    Args:
        folder: the folder's descriptor.
        name: without a slash.
        content: of the file from now on.
        flush: have it on the disk before it has its name, so that a power cut leaves the old file or the new one.
    """
    aside = f".{name}.{os.urandom(4).hex()}"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside, dir_fd=folder)
        raise


def write_json(path: Path, value: object) -> None:
    """`write_text` of `json_text`."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Indented JSON; NaN and infinity become null, which JSON readers understand."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"


def finite(value: object) -> object:
    """`value` with NaN and infinities replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(finite, value))
    return value
