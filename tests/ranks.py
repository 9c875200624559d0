"""Processes that a test starts together, as the ranks of a run."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(worker: Path, arguments: Sequence[Sequence[str]], folder: Path, seconds: float = 300) -> None:
    """Run a script once for each rank and fail where one does; the others, which may wait for it, are killed then.

    Args:
        worker: the script.
        arguments: of each rank.
        folder: for their logs.
        seconds: that they have.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log.{rank}" for rank in range(len(arguments))]
    ranks = []
    for words, log in zip(arguments, logs, strict=True):
        command = [sys.executable, "-W", "ignore", str(worker), *words]
        with log.open("w") as stream:
            ranks.append(subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT))
    until = time.monotonic() + seconds
    codes: list[int | None] = [None]
    try:
        while None in codes and not any(codes) and time.monotonic() < until:
            time.sleep(0.1)
            codes = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(code != 0 for code in codes):
        pytest.fail("\n".join(log.read_text()[-2000:] for log in logs))
