"""Every family on two processes, with transformers' logits and gradients: tensor, sequence, pipeline, expert parallel.

One pair of processes goes through all of it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from parallel_worker import LAYOUTS, applies
from parity import merged_logits, peft_logits, write_reference

pytestmark = pytest.mark.nightly

HERE = Path(__file__).parent
CASES = [(layout, family) for layout in LAYOUTS for family in FAMILIES if applies(layout, family)]
EVERY_RUN = [("tp2_sp", "llama"), ("ep2", "mixtral")]
PARAMS = [pytest.param(*case, marks=[pytest.mark.every_run] if case in EVERY_RUN else []) for case in CASES]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the models, the adapters and the results are."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def results(directory, selected) -> list[dict[str, dict[str, float]]]:
    """Of each rank: layout/family -> name -> difference."""
    cases = sorted({f"{params['layout']}/{params['family']}" for params in selected})
    for family in sorted({params["family"] for params in selected}):
        write_reference(family, directory / family)
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [(directory / f"log.{rank}").open("w") for rank in range(2)]
    command = [sys.executable, "-W", "ignore", str(HERE / "parallel_worker.py"), str(directory)]
    ranks = [
        subprocess.Popen([*command, str(rank), *cases], env=environment, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until and all(rank.poll() is None for rank in ranks):
            time.sleep(0.2)
        # One that failed leaves the other waiting.
        codes = [rank.wait(timeout=1 if any(rank.poll() for rank in ranks) else 30) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if codes != [0, 0]:
        pytest.fail("\n".join(Path(log.name).read_text()[-2000:] for log in logs))
    return [json.loads((directory / f"results.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("layout", "family"), PARAMS)
def test_step_on_two_processes(layout, family, results):
    first, second = (result[f"{layout}/{family}"] for result in results)
    assert "logits" in second  # the last stage's rank
    worst = max(first | second, key=lambda name: max(first.get(name, 0), second.get(name, 0)))
    assert max(first.get(worst, 0), second.get(worst, 0)) < 1e-4, worst


@pytest.mark.parametrize(("layout", "family"), PARAMS)
def test_adapter_exported_from_two_processes(layout, family, results, directory):
    name = f"{layout}-{family}"
    found = torch.load(directory / f"{name}.pt", weights_only=True)
    assert (found - peft_logits(directory / family, directory / name)).abs().max() < 1e-4
    assert (found - merged_logits(directory / name)).abs().max() < 1e-4
