"""The trials of a sweep on this machine, a number of them at once."""

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.launch.signals import nohup
from posttrain.sweep import tell
from posttrain.sweep.trial import Share, Trial
from posttrain.utils.gpus import visible_gpus

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_trials(trials: list[Trial], run: Callable[[DictConfig], Any], parallel: int, total: int) -> int | None:
    """Run those that are not finished yet; a failing one doesn't stop the rest.

    Args:
        trials: to run, in order; their `value` and `error` are filled in.
        run: see `Trial.start`.
        parallel: how many at once, each with its share of the GPUs, else of the cores.
        total: trials of the whole sweep, of which a search proposes a few at a time.

    Returns:
        The signal that ended it early, or None. Running trials were told, and have saved and left.

    Raises:
        UserError: more at once than there are GPUs, or a trial's directory holds other settings.
    """
    todo = [trial for trial in trials if not trial.already_finished()]
    free = shares(min(parallel, len(todo)) or 1, visible_gpus())
    if len(todo) < len(trials):
        tell(f"{len(trials) - len(todo)} of {len(trials)} trials are finished already")
    queue, running = list(todo), {}
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        for trial, _ in running.values():
            os.kill(trial.process.pid, number)

    taken = [number for number in SIGNALS if not (number == signal.SIGHUP and nohup())]
    before = {number: signal.signal(number, on_signal) for number in taken}
    try:
        while running or (queue and not received):
            while queue and free and not received:
                trial, share = queue.pop(0), free.pop(0)
                console = "logs/console.log" if parallel > 1 else None
                tell(f"trial {trial.config.hydra.job.num + 1} of {total}: {trial.name}")
                trial.start(run, share, console)
                running[trial.process.sentinel] = trial, share
            for sentinel in wait(list(running)):
                trial, share = running.pop(sentinel)
                trial.finish()
                free.append(share)
                tell(f"{trial.name}: {trial.outcome()}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for trial in queue:
        trial.error, trial.stopped = "not started", True
    return received[0] if received else None


def shares(count: int, gpus: int) -> list[Share]:
    """Divide this machine's GPUs and cores among `count` trials.

    Raises:
        UserError: there are GPUs, but fewer than trials.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpus and count > gpus:
        raise UserError(f"`sweep.parallel={count}`: there are {gpus} GPUs; a trial needs at least one")
    named = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n] or [str(i) for i in range(gpus)]
    return [
        Share(
            gpus=named[i * gpus // count : (i + 1) * gpus // count] if gpus else None,
            # At least one core each: with more trials than cores they take turns.
            cores=set(cores[i * len(cores) // count : (i + 1) * len(cores) // count]) or {cores[i % len(cores)]},
        )
        for i in range(count)
    ]
