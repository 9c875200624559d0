"""Every family on two processes, with transformers' logits and gradients: tensor, sequence, pipeline, expert parallel.

One pair of processes goes through all of it.
"""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from parallel_worker import LAYOUTS, applies
from parity import merged_logits, peft_logits, write_reference
from ranks import run_ranks

pytestmark = pytest.mark.nightly

WORKER = Path(__file__).with_name("parallel_worker.py")
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
    run_ranks(WORKER, [[str(directory), str(rank), *cases] for rank in range(2)], directory)
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
