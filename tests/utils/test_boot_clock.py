"""Durations come from clocks that nobody sets; the wall clock stamps, and is compared with other stamps."""

import time
from pathlib import Path

import psutil
import pytest

from posttrain.train.startup_clock import StartupClock
from posttrain.utils import boot_clock

PACKAGE = Path(__file__).resolve().parents[2] / "posttrain"
# Modules that ask for the time of day: for stamps in files, and to compare with times of files.
STAMPS = {
    "data/fingerprint.py",
    "launch/failure.py",
    "launch/launcher.py",
    "launch/node_run.py",
    "launch/worker.py",
    "sweep/trial.py",
    "train/metrics.py",
    "train/rollback.py",
    "train/trackers/mlflow_store.py",
    "utils/rundir.py",
}


def test_the_start_of_a_process_is_psutils():
    assert boot_clock.process_start() == pytest.approx(psutil.Process().create_time() - psutil.boot_time(), abs=0.02)
    assert 0 < boot_clock.process_start() < boot_clock.now()


def test_a_clock_that_is_set_back_makes_no_negative_time(monkeypatch):
    clock = StartupClock(boot_clock.process_start())
    clock.mark("imports")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.mark("data")
    assert clock.seconds["imports"] > 0 and clock.seconds["data"] >= 0


def test_who_asks_for_the_time_of_day():
    asking = set()
    for path in PACKAGE.rglob("*.py"):
        if "time.time()" in path.read_text():
            asking.add(str(path.relative_to(PACKAGE)))
    assert asking == STAMPS
