"""The GPUs of this machine, without importing torch."""

import os
from pathlib import Path


def visible_gpus() -> int:
    """GPUs that a process started here would see, without importing torch: 0 on a machine without NVIDIA's driver."""
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvidiactl").exists():
        return 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        named = [part for part in listed.split(",") if part.strip()]
        if named[:1] == ["-1"]:
            return 0
        return len(named)
    gpus = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    return len(gpus) or len(list(Path("/dev").glob("nvidia[0-9]*")))
