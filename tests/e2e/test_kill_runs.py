"""Whole runs killed by SIGKILL: a few of what scripts/kill_runs.py does overnight."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kill_runs

pytestmark = pytest.mark.nightly


@pytest.mark.timeout(900)
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path):
    """Three kills of a LoRA run, one of them while it saves."""
    runs = kill_runs.Runs(tmp_path, seed=0)
    outcome = runs.run("lora", 0, ["data", "saving", "exporting"])
    assert len(outcome.kills) == 3 and not outcome.error, outcome
