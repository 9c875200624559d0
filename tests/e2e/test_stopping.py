"""Signals, dead ranks, and resuming afterwards."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import environment, finish, workers

from posttrain.launch.nodes import reserve_port

pytestmark = pytest.mark.nightly


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
    assert f"resuming after step {done}" in again.out
    assert [line["step"] for line in again.metrics if "loss" in line] == list(range(1, done + 3))


def test_a_closed_terminal_saves(started_with, words):
    """SIGHUP comes when what the command and its ranks write to is gone already."""
    master, terminal = os.openpty()
    process, run_dir = started_with(words, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    result = finish(process, run_dir)
    assert result.code == 128 + signal.SIGHUP
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped" and "stopped by SIGHUP after saving" in status["error"]
    assert (run_dir / "checkpoints" / f"iter_{result.metrics[-1]['step']:07d}").is_dir()


def test_sigterm_while_another_machine_is_waited_for(posttrain, words, tmp_path):
    """Torch waits for ten minutes, in C++: no handler of Python's would run."""
    run_dir = tmp_path / "run"
    with reserve_port() as held:
        port = held.getsockname()[1]
    waiting = ["launch.nnodes=2", "launch.master_addr=127.0.0.1", f"launch.master_port={port}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", *words, *waiting, f"hydra.run.dir={run_dir}"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(posttrain.cache),
    )  # fmt: skip
    log = run_dir / "logs" / "rank0.log"
    deadline = time.monotonic() + 240
    while not (log.exists() and "initializing torch distributed" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    result = finish(process, run_dir)
    assert time.monotonic() - told < 30
    assert result.code == 128 + signal.SIGTERM
    assert result.err == "posttrain: stopped by SIGTERM\n"


@pytest.mark.every_run
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


def test_two_processes_stop_early_at_the_same_step(posttrain, words):
    """With the optimizer's state divided; the end, the files and the export say so, and so does a second start."""
    plain = [word for word in words if not word.startswith(("peft", "optimizer.lr", "trainer.max_steps"))]
    words = [*plain, "peft=none", "optimizer.lr=0.3", "trainer.max_steps=20", "trainer.validation_interval=1",
             "trainer.early_stopping.patience=2", "trainer.export=best", "parallelism=zero1",
             "parallelism.nproc_per_node=2", "logger=csv"]  # fmt: skip
    result = posttrain(*words)
    assert result.code == 0, result.err + result.log()
    losses = {line["step"]: line["val_loss"] for line in result.metrics if line["step"] and "val_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 2 < 20
    why = f"stopped early after step {best + 2} of 20: no new lowest validation loss in 2 validations"
    assert why in result.out and f"(of step {best}, which has the lowest validation loss)" in result.out
    status = json.loads((result.run_dir / "status.json").read_text())
    assert status["state"] == "finished" and status["stopped_early"].startswith(why)
    checked = json.loads((result.run_dir / "hf/verification.json").read_text())["logits"]
    assert checked["checked"] and checked["difference"] <= checked["tolerance"]
    again = posttrain(*words, run_dir=result.run_dir)
    assert again.code == 0, again.err + again.log()
    assert why in again.out and again.summary["exported_step"] == best
    assert [line for line in again.metrics if "loss" in line] == [line for line in result.metrics if "loss" in line]
