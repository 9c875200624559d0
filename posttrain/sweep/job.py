"""What a Slurm job runs on each of its nodes: the node's ranks of a run whose configuration is already written."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig

from posttrain.config import frozen
from posttrain.errors import RunFailed, UserError
from posttrain.launch import launcher, nodes
from posttrain.launch.signals import stopped
from posttrain.plan import auto
from posttrain.spec import model_checks
from posttrain.spec.record import specify
from posttrain.utils import rundir
from posttrain.utils.gpus import visible_gpus

AGAIN = 75  # exit code (EX_TEMPFAIL) for: saved, queue this job again
SAVE = signal.SIGUSR2  # what Slurm sends before a time limit or a preemption, as the job asked it to
LEFT_TO_SLURM_S = 900.0  # after SIGTERM, which says that Slurm ends the job; longer than a grace time


@dataclass
class Job:
    """Callable that submitit runs in each task.

    Args:
        max_requeues: how often the job may be queued again.
    """

    max_requeues: int

    def __call__(self, directory: str) -> None:
        """Run this node's ranks in the run directory `directory`; leaves by sys.exit unless all went well."""
        run_dir = Path(directory)
        redirect(run_dir, int(os.environ.get("SLURM_NODEID", 0)))
        for number in (signal.SIGTERM, signal.SIGHUP, SAVE):  # until there are ranks, which get them
            signal.signal(number, _stop)
        try:
            cfg = frozen.read(run_dir)
            set_launch(cfg, os.environ, first_host())
            gpus = visible_gpus()
            line = auto.resolve(cfg, gpus)
            if line:
                print(line, flush=True)
            for number in (signal.SIGTERM, SAVE):  # launch installs its own handlers; ignored afterwards
                signal.signal(number, signal.SIG_IGN)
            spec = specify(cfg, gpus, model_checks.architecture(cfg.model))
            launcher.launch(cfg, run_dir, gpus, spec)
        except RunFailed as error:
            print(f"posttrain: {error}", file=sys.stderr, flush=True)
            if error.stopped:
                self._stopped(error.exit_code - 128, run_dir, cfg)
            sys.exit(error.exit_code)
        except UserError as error:
            print(f"posttrain: {error}", file=sys.stderr, flush=True)
            # Before the run began, which would have recorded it: a busy port, GPUs that aren't there.
            if rundir.read_json(run_dir, "status.json")["state"] == "queued":
                launcher.record(cfg, run_dir, {"state": "failed", "error": str(error), "exit_code": error.exit_code})
            sys.exit(error.exit_code)
        except Exception as error:
            traceback.print_exc()
            launcher.record(cfg, run_dir, {"state": "failed", "error": f"{type(error).__name__}: {error}"})
            sys.exit(1)

    def _stopped(self, number: int, run_dir: Path, cfg: DictConfig) -> None:
        """The run has saved and left because of a signal: to be queued again, or ended by Slurm."""
        if number == signal.SIGTERM:
            # scancel, or a preemption without a signal of ours: Slurm ends the job, or queues it again. A job that ends
            # by itself meanwhile has failed.
            time.sleep(LEFT_TO_SLURM_S)
        elif int(os.environ.get("SLURM_RESTART_COUNT", 0)) < self.max_requeues:
            launcher.record(cfg, run_dir, {"state": "queued"})
            sys.exit(AGAIN)
        else:
            error = (
                f"stopped by its time limit or a preemption; was queued again {self.max_requeues} times "
                "(hydra.launcher.max_requeues); the same command resumes it"
            )
            launcher.record(cfg, run_dir, {"state": "stopped", "error": error})


def redirect(run_dir: Path, node: int) -> None:
    """Send what this process and its children print to logs/console.log of the run; other nodes have their own."""
    name = "console.log" if node == 0 else f"console.node{node}.log"
    rundir.make(run_dir, "logs")
    console = rundir.append(run_dir, f"logs/{name}")
    os.dup2(console, 1)
    os.dup2(console, 2)
    os.close(console)


def first_host() -> str:
    """The host of rank 0: the first of the job's nodes."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    return SlurmJobEnvironment().hostnames[0]


def set_launch(cfg: DictConfig, environment: Mapping[str, str], host: str) -> None:
    """Set `launch` to what Slurm's variables say about this task, so that the nodes find each other."""
    cfg.launch.nnodes = int(environment["SLURM_NNODES"])
    cfg.launch.node_rank = int(environment["SLURM_NODEID"])
    if cfg.launch.nnodes > 1:
        cfg.launch.master_addr = host
        cfg.launch.master_port = cfg.launch.master_port or nodes.port_of_job(int(environment["SLURM_JOB_ID"]))


def _stop(number: int, frame: FrameType | None) -> None:
    raise stopped(number, "stopped by {} before it began")
