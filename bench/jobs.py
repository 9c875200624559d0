"""Commands side by side on the GPUs of this machine, each with its own, its log and its limit; the options of scripts
that take their rows from a table in YAML.
"""

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.utils.gpus import visible_gpus


@dataclass(eq=False)
class Job:
    """A command that has GPUs to itself.

    Attributes:
        name: of its row.
        command: with its arguments.
        count: GPUs that it needs.
        log: the file of all its output.
        environment: variables that differ from this process's.
        gpus: numbers of those that it has, once started.
        stopped: it took longer than it may.
    """

    name: str
    command: list[str]
    count: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: list[str] = field(init=False)
    stopped: bool = field(default=False, init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    began: float = field(init=False)

    def start(self, gpus: list[str]) -> None:
        """Start the command."""
        self.gpus = gpus
        self.began = time.monotonic()
        environment = os.environ | self.environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(self.command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def has_ended(self, limit: float) -> bool:
        """Whether the command has ended; one that has run for more than `limit` seconds is made to."""
        if self.process.poll() is None and time.monotonic() - self.began > limit:
            self.stopped = True
            self.stop()
        return self.process.poll() is not None

    def stop(self) -> None:
        """End the command, whose ranks end with it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_jobs(jobs: list[Job], gpus: list[str], limit: float) -> Iterator[Job]:
    """Start each job, in order, as soon as there are GPUs for it, and return each as it ends.

    Args:
        jobs: none needs more than `gpus`.
        gpus: numbers of the GPUs.
        limit: seconds that a job may take.
    """
    waiting = list(jobs)
    free = list(gpus)
    running: list[Job] = []
    try:
        while waiting or running:
            for job in list(waiting):
                if job.count <= len(free):
                    waiting.remove(job)
                    job.start([free.pop() for _ in range(job.count)])
                    running.append(job)
            time.sleep(0.5)
            for job in list(running):
                if job.has_ended(limit):
                    running.remove(job)
                    free += job.gpus
                    yield job
    finally:
        for job in running:
            job.stop()


def options_of_rows(description: str, table: Mapping[str, Any], out: Path, limit: float) -> argparse.ArgumentParser:
    """Return the options that such scripts have in common.

    Args:
        description: of the script.
        table: the rows by name.
        out: default directory of logs.
        limit: default of --limit.
    """
    options = argparse.ArgumentParser(description=description)
    options.add_argument("overrides", nargs="*", help="of posttrain's command line, common to all rows")
    options.add_argument("--rows", nargs="+", default=list(table), choices=table, metavar="ROW")
    options.add_argument("--gpus", type=int, default=visible_gpus(), help="how many of those that there are")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--out", type=Path, default=out)
    options.add_argument("--limit", type=float, default=limit, help="seconds that a run may take")
    return options


def choose_gpus(options: argparse.ArgumentParser, jobs: list[Job], count: int) -> list[str]:
    """Return the numbers of the GPUs that this process sees, else the first `count`; too few for a job are an error."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(number) for number in range(count)]
    if visible:
        gpus = visible.split(",")
    for job in jobs:
        if job.count > len(gpus):
            options.error(f"row {job.name} needs {job.count} GPUs and there are {len(gpus)}: see --rows and --gpus")
    return gpus


def make_empty(directory: Path) -> None:
    """Make a directory, without what it had."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
