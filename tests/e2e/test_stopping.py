"""Signals, dead ranks, and going on afterwards."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, Result, environment


@pytest.fixture
def started(posttrain, words, tmp_path):
    """Start a run that would take many steps; returns (process, Result) once it is training."""
    begun = []

    def start(*more):
        run_dir = tmp_path / "run"
        command = [sys.executable, "-m", "posttrain", *words, "trainer.max_steps=100000", *more,
                   f"hydra.run.dir={run_dir}"]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**environment(posttrain.cache), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        begun.append(process)
        deadline = time.monotonic() + 240
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return process, run_dir

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()


def finish(process, run_dir):
    """Wait for the end; nothing may be left running."""
    out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 20
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return Result(process.returncode, out, err, run_dir)


def workers(process):
    """The ranks' processes, by rank."""
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def test_sigterm_saves_and_the_same_command_goes_on(started, posttrain, words):
    process, run_dir = started()
    process.send_signal(signal.SIGTERM)
    result = finish(process, run_dir)
    assert result.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after saving" in result.err and "Traceback" not in result.err
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"
    done = result.metrics[-1]["step"]

    again = posttrain(*words, f"trainer.max_steps={done + 2}", "run.resume=auto", run_dir=run_dir)
    assert again.code == 0, again.err + again.log()
    assert f"going on after step {done}" in again.out
    assert [line["step"] for line in again.metrics if "loss" in line] == list(range(1, done + 3))


def test_a_killed_rank_is_named_and_the_other_stopped(started):
    process, run_dir = started("parallelism.nproc_per_node=2")
    workers(process)[1].send_signal(signal.SIGKILL)
    result = finish(process, run_dir)
    assert result.code == 1
    assert "rank 1 was killed by SIGKILL" in result.err and "rank1.log" in result.err


def test_killing_the_command_leaves_no_rank_behind(started):
    process, run_dir = started("parallelism.nproc_per_node=2")
    os.kill(process.pid, signal.SIGKILL)
    finish(process, run_dir)


def test_a_directory_in_use_is_refused(started, posttrain, words):
    process, run_dir = started()
    second = posttrain(*words, run_dir=run_dir)
    assert second.code == 2 and "another run is using this directory" in second.err
    assert process.poll() is None
