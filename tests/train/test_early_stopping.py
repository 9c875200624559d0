"""Runs that end when validation no longer improves, what they keep, and what they export."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stopping_worker import CASES, THRESHOLDS

from posttrain.checkpoint import directories
from posttrain.train.early_stopping import lowest, stale_validations, verdict

ROOT = Path(__file__).parents[2]
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> Path:
    """The worker's directory; with its longer runs where those are tested."""
    directory = tmp_path_factory.mktemp("stopping")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("stopping_worker.py")), str(directory)]
    if os.environ.get("POSTTRAIN_TEST_ALL"):
        command.append("--all")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return directory


def read(path: Path):
    return json.loads(path.read_text())


def validations(run_dir: Path) -> list[tuple[int, float]]:
    """Those after a step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line and line["step"] > 0]


def steps(run_dir: Path) -> list[int]:
    return sorted(map(directories.step_of, directories.checkpoints(run_dir / "checkpoints")))


def test_stale_validations_are_those_of_transformers(runs):
    for threshold, expected in zip(THRESHOLDS, read(runs / "results.json")["counts"], strict=True):
        for losses, counts in zip(CASES, expected, strict=True):
            ours = [stale_validations(losses[: end + 1], threshold) for end in range(len(losses))]
            assert ours == counts, (threshold, losses)


@pytest.mark.parametrize("name", ["stopped", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_run_stops_and_exports_the_best(runs, name):
    """The exported weights have, by transformers and PEFT, the lowest of the losses that Megatron's had."""
    found = validations(runs / name)
    best, loss = min(found, key=lambda pair: (pair[1], pair[0]))
    last = best + 2
    summary = read(runs / name / "summary.json")
    assert [step for step, _ in found] == list(range(1, last + 1)) and last < 9
    assert (summary["steps"], summary["exported_step"], summary["val_loss_after"]) == (last, best, loss)
    assert summary["stopped_early"] == (
        f"stopped early after step {last} of 9: no new lowest validation loss in 2 validations; the lowest, "
        f"{loss:.4f}, was after step {best}"
    )
    assert read(runs / "results.json")["losses"][name] == pytest.approx(loss, rel=1e-5)
    (export,) = (runs / name).glob("*/training.json")
    results = read(export)["results"]
    assert (results["exported_step"], results["val_loss_after"]) == (best, loss)
    assert f"| exported_step | {best} |" in export.with_name("README.md").read_text()


def test_saves_of_the_clock_last_until_the_next(runs):
    """One after every step: those by the step stay, the best and the last."""
    best = read(runs / "stopped/summary.json")["exported_step"]
    last = best + 2
    assert steps(runs / "stopped") == sorted({*range(3, last, 3), best, last})
    assert steps(runs / "resumed") == sorted({*range(3, 10, 3), last})  # it keeps no best


def test_the_clock_takes_a_twentieth_of_the_time_at_most(runs):
    """Saves that take ten seconds are 200 apart, whatever is asked for."""
    overdue = read(runs / "results.json")["overdue"]
    assert overdue["minute"] == [60, 270, 480, 690, 900]
    assert overdue["ten minutes"] == [600]
    assert overdue["none"] == overdue["not resumable"] == overdue["not saved"] == []


def test_a_run_stopped_early_goes_on_with_more_patience(runs):
    found = validations(runs / "resumed")
    stopped = validations(runs / "stopped")
    assert found[: len(stopped)] == stopped
    assert [step for step, _ in found] == list(range(1, 10))
    summary = read(runs / "resumed/summary.json")
    assert summary["steps"] == 9 and "stopped_early" not in summary


@pytest.mark.nightly
def test_and_is_then_the_run_that_was_not_stopped(runs):
    assert validations(runs / "resumed") == validations(runs / "undisturbed")


def test_the_reason_names_the_best():
    validations = [(10, 2.5), (20, 2.0), (30, 2.0), (40, 1.98)]
    assert verdict(validations, None, 0.0) is None
    assert verdict(validations[:2], 1, 0.0) is None
    assert verdict(validations, 2, 0.0) is None  # the last is lower
    assert verdict(validations, 2, 0.05) == (
        "no new lowest validation loss by more than 0.05 in 2 validations; the lowest, 1.9800, was after step 40"
    )
    assert verdict(validations[:3], 1, 0.0) == (
        "no new lowest validation loss in 1 validation; the lowest, 2.0000, was after step 20"
    )
    assert verdict([(1, NAN), (2, NAN)], 1, 0.0) == "no new lowest validation loss in 1 validation"
    assert verdict([], 1, 0.0) is None


def test_the_lowest_is_the_first_of_equal_ones():
    assert lowest([(1, NAN), (2, 1.5), (3, 1.0), (4, 1.0), (5, INF)]) == (3, 1.0)
    assert lowest([(1, NAN)]) is None
