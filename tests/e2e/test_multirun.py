"""A grid of real runs: one that diverges, one that finishes, and the same command again."""

import json
import time


def test_a_grid_with_a_failing_trial_then_again(posttrain, words, tmp_path):
    fixed = [word for word in words if not word.startswith("optimizer.lr")]
    grid = [*fixed, "--multirun", "optimizer.lr=1e-2,1e30", f"hydra.sweep.dir={tmp_path}"]
    first = posttrain(*grid)
    good, bad = tmp_path / "lr=0.01", tmp_path / "lr=1e+30"
    assert (bad / "status.json").exists(), first.err
    states = {path.name: json.loads((path / "status.json").read_text()) for path in (good, bad)}
    assert states[good.name]["state"] == "finished", first.err
    assert states[bad.name]["state"] == "failed" and "nan" in states[bad.name]["error"].lower()
    assert first.code == 1 and "1 of 2 trials failed: lr=1e+30" in first.err and "Traceback" not in first.err
    assert (tmp_path / "best").resolve() == (good / "adapter").resolve()
    assert "lr=0.01" in (tmp_path / "report.html").read_text()

    metrics = (good / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    again = posttrain(*[word.replace(",1e30", ",1e-2") for word in grid])
    assert again.code == 0 and "1 of 1 trials are finished already" in again.err, again.err
    assert time.monotonic() - began < 30  # nothing was run; a few seconds on an idle machine
    assert (good / "metrics.jsonl").read_bytes() == metrics
