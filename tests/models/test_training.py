"""Every family trained by the product gives the loss curve of a plain transformers (and peft) loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[list[float]]]:
    """family-method -> losses of the product and of the plain loop."""
    directory = tmp_path_factory.mktemp("training")
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "training_worker.py"), str(directory)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_curve(family, method, results, record_property):
    ours, plain = results[f"{family}-{method}"]
    assert len(ours) == 20
    assert ours[-1] < 0.9 * ours[0]  # it learns
    error = max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
    record_property("error", error)  # scripts/family_table.py reads it
    assert error < 1e-4
