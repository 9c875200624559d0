"""GPUs by name, and those of this machine, without importing torch."""

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from posttrain.errors import UserError
from posttrain.utils.suggest import nearest

# Name -> dense bf16 TFLOP/s by the vendor's data sheet, without sparsity; GiB that a process can have, as torch reports
# them: less than the number on the box; TB/s of its memory by the data sheet; GB/s between GPUs of a machine, both ways
# together, by the data sheet: NVLink's, else PCIe's; compute capability. A100 and H100 are the 80 GB ones.
KNOWN = {
    "B200": (2250.0, 178.0, 8.0, 1800, (10, 0)),
    "GB200": (2500.0, 184.0, 8.0, 1800, (10, 0)),
    "H200": (989.0, 139.8, 4.8, 900, (9, 0)),
    "H100 NVL": (835.0, 93.1, 3.9, 600, (9, 0)),
    "H100 PCIe": (756.0, 79.2, 2.0, 128, (9, 0)),
    "H100": (989.0, 79.2, 3.35, 900, (9, 0)),
    "GH200": (989.0, 94.5, 4.0, 900, (9, 0)),
    "H20": (148.0, 95.1, 4.0, 900, (9, 0)),
    "A100": (312.0, 79.2, 2.0, 600, (8, 0)),
    "A800": (312.0, 79.2, 2.0, 400, (8, 0)),
    "L40S": (362.0, 44.4, 0.86, 64, (8, 9)),
    "L40": (181.0, 44.4, 0.86, 64, (8, 9)),
    "L4": (121.0, 22.0, 0.3, 64, (8, 9)),
    "A10": (125.0, 22.1, 0.6, 64, (8, 6)),
    "A6000": (155.0, 47.4, 0.77, 64, (8, 6)),
    "RTX 4090": (165.0, 23.5, 1.0, 64, (8, 9)),
}
NVLINK = 400  # GB/s from which on it is NVLink
SIZE_TOLERANCE = 0.1  # of a memory's size by its name against what a process can have of it
HOST_LINK = 53e9  # of Hopper and newer
# Of all GPUs of a machine together: four H200s that copy at the same time. Of more it is an assumption.
HOST_LINKS = 4 * 36e9
HOPPER = (9, 0)
# Of products of E4M3 numbers, torch's with a scale per row and Transformer Engine's: Ada.
EIGHT_BIT = (8, 9)
# Of torch's grouped ones, by the first number: Hopper, and Blackwell of data centres.
GROUPED_EIGHT_BIT = (9, 10)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as the vendor writes it.
        tflops: dense bf16 TFLOP/s by the data sheet; None where unknown.
        memory_gib: GiB that a process can have.
        bandwidth: TB/s of its memory; None where unknown.
        link: GB/s between GPUs of a machine, both ways together; None where unknown.
        host_gib: memory of its machine that is there for each GPU; None where unknown.
        capability: compute capability; None where unknown.
    """

    name: str
    tflops: float | None
    memory_gib: float
    bandwidth: float | None = None
    link: float | None = None
    host_gib: float | None = None
    capability: tuple[int, int] | None = None

    def host_link(self, gpus: int) -> float:
        """Bytes a second to and from page-locked memory of its machine: an H200's by PCIe 5, older ones' half of it.

        Args:
            gpus: of the machine that copy at the same time.
        """
        own = HOST_LINK if self.eight_bit else HOST_LINK / 2
        return min(own, HOST_LINKS / gpus)

    @property
    def nvlink(self) -> bool:
        """Whether GPUs of a machine are taken to be connected by NVLink, as those of an unknown kind are."""
        return self.link is None or self.link >= NVLINK

    @property
    def eight_bit(self) -> bool:
        """Whether 8-bit products with a scale per row were measured on its kind: Hopper and newer."""
        return self.capability is not None and self.capability >= HOPPER

    def check_eight_bit(self, grouped: bool) -> None:
        """Refuse `precision=fp8` where the GPU is known to lack its products.

        Args:
            grouped: whether a mixture's experts are kept in 8 bits.

        Raises:
            UserError: it lacks them.
        """
        if self.capability is None:
            return
        has = f"{self.name}, has compute capability {'.'.join(map(str, self.capability))}"
        if self.capability < EIGHT_BIT:
            raise UserError(
                f"`precision=fp8`: the GPU, {has}; products in 8 bits need 8.9 or newer (Ada, Hopper, Blackwell); use "
                "precision=bf16"
            )
        if grouped and self.capability[0] not in GROUPED_EIGHT_BIT:
            raise UserError(
                f"`precision=fp8`: the GPU, {has}; products of experts in 8 bits need 9 or 10 (Hopper, data-centre "
                "Blackwell); use precision=bf16"
            )


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """Return the GPU of a name such as `h100`, `4090` or, as nvidia-smi has it, `NVIDIA H100 80GB HBM3`.

    Args:
        name: in any spelling; a size in it has to be that of the kind.
        memory_gib: None: what that kind has.

    Returns:
        The kind; of one that isn't known, with a memory, only that.

    Raises:
        UserError: it isn't known, and no memory is given.
    """
    names = {_normalize(known): known for known in KNOWN}
    key = _normalize(_kind_with_size(name) or name)
    if key not in names:
        if memory_gib is not None:
            return Gpu(name, None, memory_gib)
        match = nearest(key, names)
        hint = f"; did you mean {match}?" if match else "."
        raise UserError(
            f"`plan.gpu={name}`: not known{hint} Known: {', '.join(names)}; or give plan.memory_gib as well"
        )
    known = names[key]
    tflops, usual_gib, bandwidth, link, capability = KNOWN[known]
    return Gpu(known, tflops, memory_gib or usual_gib, bandwidth, link, capability=capability)


def _kind_with_size(name: str) -> str | None:
    """The kind of a GPU in a driver's words; None: they aren't, or the kind is not known with the size in them."""
    kind = _kind(name)
    if kind is None or not name.startswith("NVIDIA "):
        return None
    size = re.search(r"(\d+) ?GB", name)
    if size and abs(float(size[1]) - KNOWN[kind][1]) > SIZE_TOLERANCE * KNOWN[kind][1]:
        return None
    return kind


def _kind(device_name: str) -> str | None:
    """The name in KNOWN of the GPU that a driver calls so, the longest that is part of it; None: there is none."""
    return max((name for name in KNOWN if name in device_name), key=len, default=None)


def _normalize(name: str) -> str:
    return re.sub("rtx|[ _-]", "", name.lower())


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 TFLOP/s of the GPU that a driver calls so, None where unknown."""
    return named_by_driver(device_name).tflops


def named_by_driver(device_name: str, memory_gib: float = 0.0) -> Gpu:
    """Return the GPU that a driver calls so, with what is known of its kind.

    Args:
        device_name: e.g. NVIDIA H200.
        memory_gib: as in `Gpu`.
    """
    kind = _kind(device_name)
    if kind is None:
        return Gpu(device_name, None, memory_gib)
    tflops, _, bandwidth, link, capability = KNOWN[kind]
    return Gpu(device_name, tflops, memory_gib, bandwidth, link, capability=capability)


def visible_gpus() -> int:
    """GPUs that a process started here would see: 0 on a machine without NVIDIA's driver."""
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvidiactl").exists():
        return 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        devices = [part for part in listed.split(",") if part.strip()]
        return 0 if devices[:1] == ["-1"] else len(devices)
    gpus = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    return len(gpus) or len(list(Path("/dev").glob("nvidia[0-9]*")))


def detect_gpus() -> list[Gpu]:
    """Return the GPUs that a process started here would see, by nvidia-smi.

    Empty where that is not installed or fails.
    """
    listing = _query_gpus()
    gpus = parse_listing(listing, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpus:
        host_gib = psutil.virtual_memory().total / 2**30 / len(listing.splitlines())
        gpus = [replace(gpu, host_gib=host_gib) for gpu in gpus]
    return gpus


def smallest_gpu() -> Gpu | None:
    """That with the least memory of the visible GPUs, on which a run has to fit; None where none is known."""
    return min(detect_gpus(), key=lambda gpu: gpu.memory_gib, default=None)


def oldest_gpu() -> Gpu | None:
    """That with the lowest compute capability of the visible GPUs; None where none is known."""
    known = [gpu for gpu in detect_gpus() if gpu.capability is not None]
    return min(known, key=lambda gpu: gpu.capability or (0, 0), default=None)


@functools.cache  # a grid asks for each of its trials
def _query_gpus() -> str:
    """nvidia-smi's lines about this machine's GPUs; empty where it is not installed or fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = "--query-gpu=index,uuid,name,memory.total,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_listing(listing: str, visible: str | None) -> list[Gpu]:
    """Return the GPUs of nvidia-smi's lines that CUDA_VISIBLE_DEVICES leaves, in its order.

    Args:
        listing: lines of `index, uuid, name, MiB, compute capability`.
        visible: CUDA_VISIBLE_DEVICES, indices or (parts of) UUIDs; None: not set.
    """
    by_index: dict[str, Gpu] = {}
    by_uuid: dict[str, Gpu] = {}
    for line in listing.splitlines():
        index, uuid, name, mib, capability = (part.strip() for part in line.split(","))
        # nvidia-smi also counts what the driver keeps for itself, about half a GiB.
        gpu = named_by_driver(name, float(mib) / 1024 - 0.5)
        major, dot, minor = capability.partition(".")
        if dot:
            gpu = replace(gpu, capability=(int(major), int(minor)))
        by_index[index] = gpu
        by_uuid[uuid] = gpu
    if visible is None:
        return list(by_index.values())
    gpus = []
    for device in visible.split(","):
        device = device.strip()
        if device in by_index:
            gpus.append(by_index[device])
        elif device and not device.isdigit():
            gpus += [gpu for uuid, gpu in by_uuid.items() if uuid.startswith(device)][:1]
    return gpus
