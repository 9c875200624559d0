"""A synchronous checkpoint is written without a second process."""

import queue
from functools import wraps
from types import ModuleType

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, patch, replace


def _save_in_process(module: ModuleType) -> None:
    """Let a save that waits for its result hand it over in a queue of its own process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    save = module.TorchDistSaveShardedStrategy.save

    @wraps(save)
    def save_with_queue(self: object, *args: object, **kwargs: object) -> object:
        # An asynchronous save in another process needs the manager's queue, and may have one already.
        previous = filesystem_async._results_queue
        replace(filesystem_async, _results_queue=queue.Queue())
        try:
            return save(self, *args, **kwargs)
        finally:
            replace(filesystem_async, _results_queue=previous)

    replace(module.TorchDistSaveShardedStrategy, save=save_with_queue)


@patch(
    "results-queue",
    kind=Kind.STARTUP,
    symptom="a rank's first save starts a process that imports torch (5 s), to pass the result of a write by threads",
    versions={"megatron-core": ">=0.19,<0.20"},
)
def save_without_manager() -> None:
    """Keep the manager process for asynchronous saves."""
    on_import("megatron.core.dist_checkpointing.strategies.torch", _save_in_process)
