"""The trials of a sweep on this machine, a number of them at once."""

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from omegaconf import DictConfig

from posttrain.errors import UserError
from posttrain.launch import fork_server
from posttrain.launch.signals import nohup
from posttrain.sweep.screen import SweepScreen
from posttrain.sweep.trial import Share, Trial
from posttrain.utils.gpus import visible_gpus

POLL_S = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_trials(trials: list[Trial], run: Callable[[DictConfig], Any], screen: SweepScreen) -> int | None:
    """Run those that are not finished yet; a failing one doesn't stop the rest.

    Args:
        trials: to run, in order; their `value` and `error` are filled in.
        run: see `Trial.start`.
        screen: of the whole sweep, of which a search proposes a few trials at a time; says how many run at once, each
            with its share of the GPUs, else of the cores.

    Returns:
        The signal that ended it early, or None. Running trials got it as well, saved and ended.

    Raises:
        UserError: more at once than there are GPUs, or a trial's directory holds other settings.
    """
    todo: list[Trial] = []
    finished: list[Trial] = []
    for trial in trials:
        (finished if trial.already_finished() else todo).append(trial)
    free = shares(min(screen.parallel, len(todo)) or 1, visible_gpus())
    screen.finished_before(finished)
    queue = list(todo)
    running: dict[Any, tuple[Trial, Share]] = {}  # by the sentinel of the trial's process
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for trial, _ in running.values():
            trial.send_signal(number)

    handled = [number for number in SIGNALS if not (number == signal.SIGHUP and nohup())]
    previous = {number: signal.signal(number, on_signal) for number in handled}
    try:
        while running or (queue and not received):
            while queue and free and not received:
                trial = queue.pop(0)
                share = free.pop(0)
                if trial.config.launch.prestart is not False:
                    fork_server.ensure(trial.rank_environment(share))
                running[trial.start(run, share, screen.started(trial))] = trial, share
            for sentinel in wait(list(running), timeout=POLL_S):
                trial, share = running.pop(sentinel)
                trial.finish()
                free.append(share)
                screen.ended(trial)
            screen.refresh()
    finally:
        screen.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
    for trial in queue:
        trial.error = "not started"
        trial.stopped = True
    return received[0] if received else None


def shares(count: int, gpus: int) -> list[Share]:
    """Divide this machine's GPUs and cores among `count` trials.

    Raises:
        UserError: there are GPUs, but fewer than trials.
    """
    if gpus and count > gpus:
        raise UserError(f"`sweep.parallel={count}`: there are {gpus} GPUs; a trial needs at least one")
    cores = sorted(os.sched_getaffinity(0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device for device in visible.split(",") if device] or list(map(str, range(gpus)))
    divided = []
    for index in range(count):
        # At least one core each: with more trials than cores they take turns.
        own_cores = set(_part(cores, index, count)) or {cores[index % len(cores)]}
        own_devices = _part(devices[:gpus], index, count) if gpus else None
        divided.append(Share(own_devices, own_cores))
    return divided


def _part[T](items: list[T], index: int, count: int) -> list[T]:
    """One of `count` consecutive parts of `items`, as equal in length as they can be."""
    return items[index * len(items) // count : (index + 1) * len(items) // count]
