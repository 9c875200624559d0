"""GPUs by name, and those of this machine, without torch."""

import difflib
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass

from posttrain.errors import UserError
from posttrain.flops import PEAK_TFLOPS

# GiB that a process can have, as torch reports them: less than the number on the box. A100 and H100: the 80 GB ones.
MEMORY_GIB = {
    "B200": 178.0, "GB200": 184.0, "H200": 139.8, "H100 NVL": 93.1, "H100 PCIe": 79.2, "H100": 79.2, "GH200": 94.5,
    "H20": 95.1, "A100": 79.2, "A800": 79.2, "L40S": 44.4, "L40": 44.4, "L4": 22.0, "A10": 22.1, "A6000": 47.4,
    "RTX 4090": 23.5,
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as the vendor writes it.
        tflops: dense bf16 TFLOP/s by the data sheet; None where unknown.
        memory_gib: GiB that a process can have.
    """

    name: str
    tflops: float | None
    memory_gib: float

    @property
    def eight_bit(self) -> bool:
        """Whether it multiplies 8-bit numbers with a scale per row: Hopper and newer."""
        return any(name in self.name for name in ("H100", "H200", "H20", "H800", "GH200", "B200"))


def named(word: str, memory_gib: float | None = None) -> Gpu:
    """The GPU that a person means by `h100` or `4090`.

    Raises:
        UserError: it isn't known.
    """
    names = {_plain(name): name for name in MEMORY_GIB}
    if (name := names.get(_plain(word))) is None:
        close = difflib.get_close_matches(_plain(word), names, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"`plan.gpu={word}`: not known{meant} Known: {', '.join(names)}; or give plan.memory_gib")
    return Gpu(name, PEAK_TFLOPS[name], memory_gib or MEMORY_GIB[name])


def _plain(word: str) -> str:
    return word.lower().replace("rtx", "").replace(" ", "").replace("-", "").replace("_", "")


def detected() -> list[Gpu]:
    """The GPUs that a process started here would see, by nvidia-smi; none where that isn't there or fails."""
    return parsed(_listing(), os.environ.get("CUDA_VISIBLE_DEVICES"))


@functools.cache  # a grid asks for each of its trials
def _listing() -> str:
    """What nvidia-smi says about this machine's GPUs; empty where it isn't there or fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def parsed(listing: str, visible: str | None) -> list[Gpu]:
    """The GPUs of nvidia-smi's `index, uuid, name, MiB` lines that CUDA_VISIBLE_DEVICES leaves, in its order."""
    found = {}
    for line in listing.splitlines():
        index, uuid, name, mib = (part.strip() for part in line.split(","))
        known = [key for key in PEAK_TFLOPS if key in name]
        # nvidia-smi counts what the driver keeps for itself as well, about half a GiB.
        gpu = Gpu(name, PEAK_TFLOPS[max(known, key=len)] if known else None, float(mib) / 1024 - 0.5)
        found[index] = found[uuid] = gpu
    if visible is None:
        return [gpu for key, gpu in found.items() if key.isdigit()]
    words = [word.strip() for word in visible.split(",") if word.strip()]
    whole = [next((key for key in found if key == word or (key.startswith(word) and not word.isdigit())), None)
             for word in words]  # fmt: skip
    return [found[key] for key in whole if key is not None]
