"""Ranks that import while their command still composes the configuration.

Importing torch and Megatron is most of a run's start and needs nothing of the configuration. This machine's ranks are
started before it is composed, as many as the command line seems to ask for, import, and wait for their orders on their
standard input. A command that ends without any, because of a mistake in it, takes the waiting processes with it.
No torch here.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from posttrain.launch import nodes
from posttrain.launch.rank_process import base_environment, start_process
from posttrain.train.console import ScreenPipe
from posttrain.utils import heartbeat
from posttrain.utils.gpus import visible_gpus
from posttrain.utils.heartbeat import Monitor
from posttrain.utils.rank_environment import UI_FD


class PrestartedRank:
    """A process of `posttrain.launch.worker` without a run.

    Args:
        env: its whole environment as far as it is known.
        local_rank: which of this machine's it will be.
        local_size: how many this machine is thought to have.

    Attributes:
        drawing: what the first one sends to be drawn; None: it is another.
    """

    def __init__(self, env: dict[str, str], local_rank: int, local_size: int) -> None:
        self.local_size = local_size
        self.monitor = Monitor(local_rank)
        self.drawing: ScreenPipe | None = None
        env = {**env, "LOCAL_RANK": str(local_rank), heartbeat.FD: str(self.monitor.inherited)}
        inherited = [self.monitor.inherited]
        if local_rank == 0:
            self.drawing = ScreenPipe()
            env[UI_FD] = str(self.drawing.inherited)
            inherited.append(self.drawing.inherited)
        with tempfile.TemporaryFile() as output:  # the rank copies it to its log, which is not known yet
            self.process = start_process([], env, subprocess.PIPE, output, inherited)
        self.monitor.started()
        if self.drawing:
            self.drawing.started()

    def assign(self, rank: int, run_dir: Path, log: str, env: dict[str, str]) -> bool:
        """Make it rank `rank` of the run in `run_dir`, with the log of that name there; whether it could be."""
        self.monitor.rank = rank
        orders = {"run_dir": str(run_dir), "log": log, "env": env}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(orders).encode() + b"\n")
            self.process.stdin.close()
        except OSError:
            return False
        return self.process.poll() is None

    def end(self) -> None:
        """Kill the pre-started process."""
        self.process.kill()
        self.process.wait()
        self.monitor.close()
        if self.drawing:
            self.drawing.close()


_waiting: dict[int, PrestartedRank] = {}  # by local rank


def start(overrides: list[str]) -> None:
    """Start this machine's ranks now, if the command line `overrides` is that of one run here."""
    gpus = visible_gpus()
    count = ranks_wanted(overrides, gpus)
    if not count:
        return
    env = base_environment(gpus, local_size=count)
    for local_rank in nodes.local_ranks(count):
        _waiting[local_rank] = PrestartedRank(env, local_rank, count)


def take(local_rank: int) -> PrestartedRank | None:
    """The process that waits to become that rank of this machine, once."""
    return _waiting.pop(local_rank, None)


def end_unused() -> None:
    """End those that wait though the run has all its ranks."""
    for local_rank in list(_waiting):
        _waiting.pop(local_rank).end()


def ranks_wanted(overrides: list[str], gpus: int) -> int:
    """How many ranks to start for a command line: of one run here, on GPUs, where it pays most; 0: none.

    Set by `launch.prestart` otherwise. One for each GPU, or as many as the command line says; what an experiment says
    is only found out later.
    """
    wanted = gpus > 0
    count = max(1, gpus)
    for override in overrides:
        if override.startswith(("-", "hydra/", "launch.submit=true")):
            return 0
        name, _, value = override.partition("=")
        if name == "launch.prestart":
            wanted = gpus > 0 if value.lower() == "null" else value.lower() == "true"
        if name == "parallelism.nproc_per_node" and value.isdigit():
            count = int(value)
        if override == "parallelism=single":
            count = 1
    if not wanted:
        return 0
    return min(count, gpus or len(os.sched_getaffinity(0)))  # nothing has been checked yet
