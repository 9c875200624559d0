"""A rank that imports while its command still composes the configuration.

Importing torch and Megatron is most of a run's start and asks nothing of the configuration. The first local rank is
started before it is composed, imports, and waits for its orders on its standard input. A command that ends without any,
because of a mistake in it, takes the waiting process with it. No torch here.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from posttrain.utils import heartbeat
from posttrain.utils.heartbeat import Monitor

OPTION = "launch.prestart="


class PrestartedRank:
    """A process of `posttrain.launch.worker` without a run.

    Args:
        command: how to start a worker.
        env: its whole environment as far as it is known.
        preexec: called in the child.
    """

    def __init__(self, command: list[str], env: dict[str, str], ui_fd: str, preexec) -> None:
        self.monitor, ui = Monitor(0), os.dup(1)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  (it becomes the rank's log, which is not known yet)
        try:
            self.process = subprocess.Popen(
                command,
                env={**env, ui_fd: str(ui), heartbeat.FD: str(self.monitor.inherited)},
                stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT, text=True,
                pass_fds=(self.monitor.inherited, ui), start_new_session=True, preexec_fn=preexec,
            )  # fmt: skip
        finally:
            os.close(ui)
        self.monitor.started()

    def give(self, rank: int, run_dir: Path, log: str, env: dict[str, str]) -> bool:
        """Make it rank `rank` of the run in `run_dir`, with the log of that name there; whether it could be."""
        self.monitor.rank = rank
        orders = {"run_dir": str(run_dir), "log": log, "env": env}
        try:
            self.process.stdin.write(json.dumps(orders) + "\n")
            self.process.stdin.close()
        except OSError:
            return False
        return self.process.poll() is None

    def end(self) -> None:
        """It isn't needed."""
        self.process.kill()
        self.process.wait()
        self.monitor.close()


def wanted(words: list[str], gpus: int) -> bool:
    """Whether the command line `words` is one run here: on a GPU, where it pays most, unless launch.prestart is set."""
    if any(word.startswith(("-", "hydra/", "launch.submit=true")) for word in words):
        return False
    said = [word.removeprefix(OPTION) for word in words if word.startswith(OPTION)]
    return said[-1].lower() == "true" if said and said[-1] != "null" else gpus > 0
