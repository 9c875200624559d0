"""Seals of cached folders: what is trained on is what was written.

A disk, or a person, may change a file of the cache, and flipped token ids would be trained on in silence. So a folder
is sealed with the SHA-256 of its files when it is made. Names and sizes are compared when it is opened, the content in
the background while the model is built.
"""

import hashlib
import json
import logging
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.utils.atomic_files import write_json
from posttrain.utils.cache import discard

log = logging.getLogger(__name__)

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Write down what the files of `folder` are."""
    files = sorted(path for path in folder.iterdir() if path.name != SEAL)
    write_json(folder / SEAL, {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files})


def problem(folder: Path, hashes: bool = False) -> str | None:
    """What is wrong with a sealed folder, or None.

    Args:
        folder: it is there.
        hashes: read every byte as well; without it names and sizes alone.
    """
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        unsealed = sorted({path.name for path in folder.iterdir()} - {SEAL, *sealed})
        if unsealed:
            return f"{unsealed[0]} is not in {SEAL}"
        for name, entry in sealed.items():
            path = folder / name
            status = path.lstat()
            if path.name != name or not stat.S_ISREG(status.st_mode):
                return f"{SEAL} names {name[:200]!r}, which is not a file of this folder"
            if status.st_size != entry["size"]:
                return f"{name} has {status.st_size} bytes instead of {entry['size']}"
            if hashes and _sha256(path) != entry["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"can't be read: {error}"
    return None if sealed else f"{SEAL} is empty"


@dataclass
class Used:
    """The sealed folders that a process has opened.

    Args:
        verify: whether this process reads them whole, in the background; of several on one machine one is enough.
    """

    verify: bool = True
    opened: dict[Path, int] = field(default_factory=dict)  # -> descriptor, by which it is known if it was made again
    damage: dict[Path, str] = field(default_factory=dict)  # what is wrong with it
    threads: list[threading.Thread] = field(default_factory=list)

    def add(self, folder: Path, made: bool) -> None:
        """`folder` was opened; `made` says that this process has just written it, and knows what is in it."""
        if folder not in self.opened:
            self.opened[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self.verify and not made:
            thread = threading.Thread(target=self._verify, args=(folder,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def _verify(self, folder: Path) -> None:
        why = problem(folder, hashes=True)
        if why:
            self.damage[folder] = why

    def remove_damaged(self, verify: bool = False) -> bool:
        """Wait for what is read in the background and remove what is damaged, so that it is made again.

        Args:
            verify: read all of them here and now, whether this process was to or not.

        Returns:
            Whether anything was damaged, or has been replaced by another process.
        """
        for thread in self.threads:
            thread.join()
        damaged = dict(self.damage)
        for folder, descriptor in self.opened.items():
            inode = os.fstat(descriptor).st_ino
            if not folder.is_dir() or folder.stat().st_ino != inode:
                damaged[folder] = "another process has replaced it"
                continue
            why = problem(folder, hashes=True) if verify else self.damage.get(folder)
            if why:
                damaged[folder] = why
                discard(folder, inode)
        for folder, why in damaged.items():
            log.warning("data: %s is damaged (%s) and is made again", folder, why)
        for descriptor in self.opened.values():
            os.close(descriptor)
        self.opened, self.damage, self.threads = {}, {}, []
        return bool(damaged)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
