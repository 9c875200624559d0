"""A clock that all processes of a machine share and that nobody sets: durations across processes are never negative."""

import os
import time
from pathlib import Path


def now() -> float:
    """Seconds since the machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_start() -> float:
    """When this process was started, before its imports, as `now` counts; proc(5), `starttime`."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
