"""Start training_worker.py and read what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment() -> dict[str, str]:
    """This process's, with the project importable and one thread."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def losses(directory: Path, cases: list[str], *options: str) -> dict[str, dict]:
    """Of each case (family-method): losses of the product (ours) and of the plain loop; see the worker."""
    command = [sys.executable, "-W", "ignore", str(HERE / "training_worker.py"), str(directory), *cases, *options]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    return json.loads((directory / "results.json").read_text())


def error(ours: list[float], plain: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
