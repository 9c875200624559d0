"""Whole runs killed by SIGKILL: a few of what scripts/kill_runs.py does overnight."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kill_runs

pytestmark = pytest.mark.nightly


@pytest.mark.timeout(900)
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path):
    """Kills of a LoRA run; a quick one ends before the last comes."""
    runs = kill_runs.Runs(tmp_path, seed=0)
    outcome = runs.run("lora", 0, ["data", "saving", "exporting"])
    assert {"data", "saving"} <= {kill.phase for kill in outcome.kills} and not outcome.error, outcome
