"""A grid of real runs: one that finishes, one that fails, one that is pruned; and the same command again."""

import json
import resource
import subprocess
import sys
import time

import grid_rows
import pytest
from commands import environment

pytestmark = pytest.mark.nightly


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_grid_with_a_failing_trial_then_again(posttrain, words, tmp_path):
    """A grid over files of training data: the second is cut off, the third teaches other answers than are validated."""
    grid_rows.write(tmp_path)
    fixed = [word for word in words if not word.startswith("data.path")]
    grid = [*fixed, "--multirun", "data.path=good.jsonl,cut.jsonl,poor.jsonl", *grid_rows.VALIDATED,
            f"hydra.sweep.dir={tmp_path / 'grid'}"]  # fmt: skip
    pruner = ["sweep.pruner=median", "sweep.pruner_startup_trials=1", "sweep.pruner_warmup_steps=2"]
    here = tmp_path / "run"  # of which only the folder matters: the paths are relative to it
    first = posttrain(*grid, *pruner, run_dir=here)
    good, bad, poor = (tmp_path / "grid" / f"path={name}.jsonl" for name in ("good", "cut", "poor"))
    assert (poor / "status.json").exists(), first.err
    states = {path.name: json.loads((path / "status.json").read_text()) for path in (good, bad, poor)}
    assert states[good.name]["state"] == "finished", first.err
    assert states[bad.name]["state"] == "failed"
    assert grid_rows.ERROR in states[bad.name]["error"]
    assert first.code == 1 and "1 of 3 trials failed: path=cut.jsonl" in first.err and "Traceback" not in first.err
    assert (tmp_path / "grid/best").resolve() == (good / "adapter").resolve()
    assert "path=good.jsonl" in (tmp_path / "grid/report.html").read_text()

    assert states[poor.name]["state"] == "pruned" and "after step 2: validation loss" in first.err
    assert [line["step"] for line in metrics(poor) if "loss" in line] == [1, 2]
    assert (poor / "checkpoints").exists() and not (poor / "adapter").exists()

    before = (good / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    grid = [word.replace(",cut.jsonl", "") for word in grid]
    again = posttrain(*grid, *pruner, run_dir=here)
    assert again.code == 0 and "2 of 2 trials have already finished" in again.err, again.err
    assert time.monotonic() - began < 30  # nothing was run; a few seconds on an idle machine
    assert (good / "metrics.jsonl").read_bytes() == before

    whole = posttrain(*grid, run_dir=here)  # without a pruner the pruned trial resumes
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_is_what_the_run_is_alone(posttrain, words, tmp_path, ranks):
    """The second trial's ranks are forked from the process that the first one's are from: not a digit differs."""
    words = [word for word in words if not word.startswith("optimizer.lr=")]
    words += [f"parallelism.nproc_per_node={ranks}", "trainer.num_generations=1", "trainer.validation_interval=2"]
    swept = posttrain(*words, "--multirun", "optimizer.lr=3e-2,1e-2", f"hydra.sweep.dir={tmp_path / 'grid'}")
    assert swept.code == 0, swept.err
    alone = posttrain(*words, "optimizer.lr=1e-2", run_dir=tmp_path / "alone")
    trial = tmp_path / "grid/lr=0.01"
    compared = ("step", "loss", "grad_norm", "val_loss", "lr", "tokens")
    lines = []
    for directory in (trial, alone.run_dir):
        lines.append([{key: line.get(key) for key in compared} for line in metrics(directory)])
        assert (directory / "logs/rank0.log").read_text().count("patches: imports") == 1
    assert lines[0] == lines[1] and len(lines[0]) >= 4
    for name in ("adapter/adapter_model.safetensors", "samples.json"):
        assert (trial / name).read_bytes() == (alone.run_dir / name).read_bytes()
    startup = json.loads((trial / "summary.json").read_text())["startup_s"]
    assert startup["compose, import"] + startup["import"] < alone.summary["startup_s"]["import"] / 2
