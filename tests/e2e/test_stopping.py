"""Signals, dead ranks, and going on afterwards."""

import json
import os
import signal

from commands import finish, workers


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
