"""The process that writes checkpoints in the background doesn't outlive its rank."""

import ctypes
import multiprocessing
import os
import signal
from types import ModuleType
from typing import Any

from posttrain import orphan
from posttrain.patches import patch
from posttrain.patches.deferred import on_import

UTILS = "megatron.core.dist_checkpointing.strategies.async_utils"


def write(*args: Any) -> None:
    """Megatron's loop of the writing process, which ends with the rank that started it."""
    die_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def die_with_parent() -> None:
    """In a process of multiprocessing: be killed when its parent dies, however that dies (Linux PR_SET_PDEATHSIG)."""
    orphan.end_with(os.getppid())
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)


def _replace(module: ModuleType) -> None:
    # Only where a process is started: the writer imports the original.
    if multiprocessing.parent_process() is None:
        module.PersistentAsyncCaller.async_loop = staticmethod(write)


@patch(
    name="async-writer",
    symptom="after a rank is killed its background writer waits for work for ever, holding memory of the GPU",
    versions={"megatron-core": ">=0.19,<0.20"},
)
def end_with_rank() -> None:
    """Tie the writer's life to its rank's."""
    on_import(UTILS, _replace)
