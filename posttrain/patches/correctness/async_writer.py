"""The processes that write checkpoints in the background don't outlive their rank."""

import ctypes
import multiprocessing
import os
import signal
from types import ModuleType

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, patch, replace

STRATEGIES = "megatron.core.dist_checkpointing.strategies"


def write(*args: object) -> None:
    """Megatron's loop of the writing process, which ends with the rank that started it."""
    die_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def die_with_parent() -> None:
    """In a process of multiprocessing: be killed when its parent dies, however that dies (Linux PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)


def _replace(module: ModuleType) -> None:
    # Only where a process is started: the writer imports the original.
    if multiprocessing.parent_process() is None:
        replace(module.PersistentAsyncCaller, async_loop=staticmethod(write))


def _replace_queue(module: ModuleType) -> None:
    def get_write_results_queue(mp_mode: str = "spawn") -> object:
        """As Megatron's: the one queue of this process for what was written, in a server's process."""
        if module._results_queue is None:
            from multiprocessing.managers import SyncManager  # here: every command imports this module

            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(die_with_parent)
            replace(module, _results_queue=manager.Queue())
        return module._results_queue

    replace(module, get_write_results_queue=get_write_results_queue)


@patch(
    "async-writer",
    kind=Kind.CORRECTNESS,
    symptom="after a rank is killed its background writer, and the server of the writer's results, wait for ever",
    versions={"megatron-core": ">=0.19,<0.20"},
)
def end_with_rank() -> None:
    """Tie the life of the writer and of the server to their rank's."""
    on_import(f"{STRATEGIES}.async_utils", _replace)
    on_import(f"{STRATEGIES}.filesystem_async", _replace_queue)
