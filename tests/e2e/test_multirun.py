"""A grid of real runs: one that finishes, one that diverges, one that is pruned; and the same command again."""

import json
import resource
import subprocess
import sys
import time

import pytest
from commands import environment

pytestmark = pytest.mark.nightly


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_grid_with_a_failing_trial_then_again(posttrain, words, tmp_path):
    fixed = [word for word in words if not word.startswith("optimizer.lr")]
    grid = [*fixed, "--multirun", "optimizer.lr=1e-2,1e30,1e-9", "trainer.validation_interval=1",
            f"hydra.sweep.dir={tmp_path}"]  # fmt: skip
    pruner = ["sweep.pruner=median", "sweep.pruner_startup_trials=1", "sweep.pruner_warmup_steps=2"]
    first = posttrain(*grid, *pruner)
    good, bad, poor = tmp_path / "lr=0.01", tmp_path / "lr=1e+30", tmp_path / "lr=1e-09"
    assert (poor / "status.json").exists(), first.err
    states = {path.name: json.loads((path / "status.json").read_text()) for path in (good, bad, poor)}
    assert states[good.name]["state"] == "finished", first.err
    assert states[bad.name]["state"] == "failed" and "nan" in states[bad.name]["error"].lower()
    assert first.code == 1 and "1 of 3 trials failed: lr=1e+30" in first.err and "Traceback" not in first.err
    assert (tmp_path / "best").resolve() == (good / "adapter").resolve()
    assert "lr=0.01" in (tmp_path / "report.html").read_text()

    assert states[poor.name]["state"] == "pruned" and "after step 2: validation loss" in first.err
    assert [line["step"] for line in metrics(poor) if "loss" in line] == [1, 2]
    assert (poor / "checkpoints").exists() and not (poor / "adapter").exists()

    before = (good / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    grid = [word.replace(",1e30", "") for word in grid]
    again = posttrain(*grid, *pruner)
    assert again.code == 0 and "2 of 2 trials have already finished" in again.err, again.err
    assert time.monotonic() - began < 30  # nothing was run; a few seconds on an idle machine
    assert (good / "metrics.jsonl").read_bytes() == before

    whole = posttrain(*grid)  # without a pruner the pruned trial resumes
    assert whole.code == 0 and "1 of 2 trials have already finished" in whole.err, whole.err
    assert [line["step"] for line in metrics(poor) if "loss" in line] == [1, 2, 3, 4]
    assert json.loads((poor / "status.json").read_text())["state"] == "finished"


def test_a_disk_that_is_full_for_one_of_two_trials(posttrain, words, tmp_path):
    """Files of more than 600 kB are refused by the kernel: the checkpoints of the second trial's large adapter."""
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *words, "--multirun", "peft.rank=256,4", "sweep.parallel=2",
         "checkpoint.save_interval=2", f"hydra.sweep.dir={tmp_path / 'grid'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=400, env=environment(posttrain.cache),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
    )  # fmt: skip
    large, small = (json.loads((tmp_path / f"grid/rank={rank}/status.json").read_text()) for rank in (256, 4))
    assert done.returncode == 1 and "1 of 2 trials failed: rank=256" in done.stderr, done.stderr
    assert large["state"] == "failed" and "can't be written" in large["error"]
    assert small["state"] == "finished", small
    assert "Traceback" not in done.stderr
