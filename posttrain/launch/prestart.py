"""A rank that imports while its command still composes the configuration.

Importing torch and Megatron is most of a run's start and needs nothing of the configuration. The first local rank is
started before it is composed, imports, and waits for its orders on its standard input. A command that ends without any,
because of a mistake in it, takes the waiting process with it. No torch here.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from posttrain.launch.rank_process import base_environment, start_process
from posttrain.train.console import ScreenPipe
from posttrain.utils import heartbeat
from posttrain.utils.gpus import visible_gpus
from posttrain.utils.heartbeat import Monitor
from posttrain.utils.rank_environment import UI_FD

OPTION = "launch.prestart="


class PrestartedRank:
    """A process of `posttrain.launch.worker` without a run.

    Args:
        env: its whole environment as far as it is known.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self.monitor = Monitor(0)
        self.drawing = ScreenPipe()
        env = {**env, UI_FD: str(self.drawing.inherited), heartbeat.FD: str(self.monitor.inherited)}
        inherited = [self.monitor.inherited, self.drawing.inherited]
        with tempfile.TemporaryFile() as output:  # the rank copies it to its log, which is not known yet
            self.process = start_process([], env, subprocess.PIPE, output, inherited)
        self.monitor.started()
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
        self.drawing.close()


_waiting: PrestartedRank | None = None


def start(overrides: list[str]) -> None:
    """Start the first local rank's process now, if the command line `overrides` is that of one run here."""
    global _waiting
    gpus = visible_gpus()
    if is_wanted(overrides, gpus):
        _waiting = PrestartedRank(base_environment(gpus, local_size=1))


def take() -> PrestartedRank | None:
    """The process that waits for its orders, once."""
    global _waiting
    rank = _waiting
    _waiting = None
    return rank


def is_wanted(overrides: list[str], gpus: int) -> bool:
    """Whether a command line is one run here: on a GPU, where it pays most, unless launch.prestart is set."""
    wanted = gpus > 0
    for override in overrides:
        if override.startswith(("-", "hydra/", "launch.submit=true")):
            return False
        if override.startswith(OPTION):
            value = override.removeprefix(OPTION).lower()
            wanted = gpus > 0 if value == "null" else value == "true"
    return wanted
