"""What a sweep shows while it runs: one line for each trial that has ended, and what the running ones do."""

import io
import json
import re
import time

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from posttrain.sweep.screen import SweepScreen
from posttrain.sweep.trial import Trial
from posttrain.train.console import RankScreen

VALUES = {
    "loss": 2.5,
    "lr": 1e-3,
    "supervised_tokens_per_second": 100.0,
    "tokens_per_second": 200.0,
    "step_seconds": 2.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def trials(tmp_path):
    made = []
    for number, lr in enumerate(("0.001", "0.01", "0.1", "1")):
        config = OmegaConf.create({"hydra": {"job": {"num": number}}})
        made.append(Trial(f"lr={lr}", tmp_path / f"lr={lr}", config))
        made[-1].directory.mkdir()
        (made[-1].directory / "status.json").write_text(json.dumps({"state": "finished"}))
    return made


def test_lines_of_a_sweep_in_a_file(trials, clock):
    first, second, third, fourth = trials
    screen = SweepScreen(4, parallel=1)
    screen.console = Console(file=(file := io.StringIO()), highlight=False, soft_wrap=True)

    def said():
        lines = file.getvalue().splitlines()
        file.seek(0)
        file.truncate()
        return lines

    first.value = 5.5
    screen.finished_before([first])
    assert said() == ["posttrain: 1 of 4 trials have already finished"]

    rank = RankScreen(screen.started(second))
    rank.phase("importing")
    screen.refresh()
    assert said() == []
    clock[0] += 11.0
    screen.refresh()
    assert said() == ["posttrain: 2/4  lr=0.01  importing  11 s"]
    rank.start(0, 8)
    rank.phase("training")
    rank.step(4, VALUES)
    screen.refresh()
    assert said() == []
    clock[0] += 10.0
    screen.refresh()
    (line,) = said()
    assert line.startswith("posttrain: 2/4  lr=0.01  step 4/8  loss 2.5000") and line.endswith("eta 8 s  21 s")
    second.value = 4.25
    clock[0] += 9.0
    screen.ended(second)
    assert said() == ["posttrain: 2/4  lr=0.01  validation loss 4.25 (best)  30 s  at most 1 min left"]

    screen.started(third)
    third.error = "rank 0 was killed by SIGKILL\n  log: elsewhere"
    clock[0] += 2.0
    screen.ended(third)
    failed, log = said()
    assert failed == (
        "posttrain: 3/4  lr=0.1  rank 0 was killed by SIGKILL  best: 4.25 with lr=0.01  2 s  at most 30 s left"
    )
    assert log == f"posttrain: its log: {third.directory}/logs/console.log"

    screen.started(fourth)
    fourth.value = float("nan")
    clock[0] += 30.0
    screen.ended(fourth)
    assert said() == ["posttrain: 4/4  lr=1  validation loss nan  best: 4.25 with lr=0.01  30 s"]


def test_what_is_drawn_on_a_terminal(trials, clock):
    screen = SweepScreen(4, parallel=2)
    first, second, third, _ = trials
    first.value = 5.5
    screen.started(first)
    clock[0] += 40.0
    screen.ended(first)
    for trial in (second, third):
        rank = RankScreen(screen.started(trial))
        rank.start(0, 8)
        rank.phase("training")
        rank.step(4, VALUES)
    clock[0] += 20.0
    screen.refresh()
    for width in (40, 80, 120):
        console = Console(file=(file := io.StringIO()), width=width)
        console.print(screen)
        lines = [line.rstrip() for line in file.getvalue().splitlines()]
        assert len(lines) == 3 and all(len(line) < width for line in lines)
        assert [re.search("lr=[0-9.]+  training", line) is not None for line in lines] == [True, True, False]
    assert "2/4  lr=0.01  training  step 4/8" in lines[0] and "eta 8 s" in lines[0]
    # 20 s of each of the running ones and the last whole, two at a time.
    assert lines[2] == "1 of 4 trials done  best: 5.5 with lr=0.001  at most 40 s left"
