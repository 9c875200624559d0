"""Trials as jobs of a real Slurm: two emulated nodes on this machine, from the optional shared test data.

Needs root, and installs Debian packages where Slurm is missing: only with POSTTRAIN_TEST_SLURM=1.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from conftest import ROOT, Result, environment

from posttrain.launch import free_port


@pytest.fixture(scope="module")
def slurm(shared):
    """A cluster; its environment variables."""
    if os.environ.get("POSTTRAIN_TEST_SLURM") != "1":
        pytest.skip("starts Slurm's daemons as root, and installs them: set POSTTRAIN_TEST_SLURM=1")
    folder = shared / "slurm"
    if not (folder / "start.sh").is_file():
        pytest.skip(f"optional shared test data: no {folder}/start.sh")
    root = tempfile.mkdtemp(prefix="slurm-")  # munge wants a path that everybody may walk, which pytest's isn't
    os.chmod(root, 0o711)
    env = {**os.environ, "SLURM_ROOT": str(root), "CTLPORT": str(free_port()), "GPUS": "0"}
    subprocess.run([folder / "start.sh"], env=env, check=True, timeout=300, stdout=subprocess.DEVNULL)
    # Slurm holds a job that is queued again for two minutes; this lets it go after eight seconds.
    shorter = subprocess.Popen([folder / "nowait.sh", "600"], env=env)
    sourced = subprocess.run(["bash", "-c", f". {root}/env && env -0"], env=env, check=True, capture_output=True)
    try:
        yield dict(line.split("=", 1) for line in sourced.stdout.decode().split("\0") if "=" in line)
    finally:
        shorter.terminate()
        shorter.wait()
        subprocess.run([folder / "stop.sh"], env=env, check=True, timeout=120, stdout=subprocess.DEVNULL)
        shutil.rmtree(root)


@pytest.fixture
def start(slurm, posttrain, words, tmp_path):
    """Start a command whose jobs go to the cluster."""
    begun = []
    fixed = [word for word in words if not word.startswith("optimizer.lr")]
    options = ["hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_node=8", "hydra.launcher.poll_s=0.5"]

    def go(*more):
        command = [sys.executable, "-m", "posttrain", *fixed, *more, *options]
        # Slurm gives a job the environment that it was submitted from.
        env = {**environment(posttrain.cache), **{name: slurm[name] for name in ("PATH", "SLURM_CONF")},
               "PYTHONPATH": str(ROOT)}  # fmt: skip
        begun.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        return begun[-1]

    yield go
    for process in begun:
        if process.poll() is None:
            process.kill()


def finish(process, run_dir, timeout=240):
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err
    return Result(process.returncode, out, err, run_dir)


def until_trained(run_dir, steps):
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= steps):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def status(directory):
    return json.loads((directory / "status.json").read_text())


def job(run_dir):
    return json.loads((run_dir / "slurm.json").read_text())["job"]


def test_a_grid_gives_what_a_run_here_gives(start, posttrain, words, tmp_path):
    grid = ["--multirun", "hydra/launcher=slurm", "optimizer.lr=1e-2,1e30", "peft.rank=4,8",
            f"hydra.sweep.dir={tmp_path / 'grid'}"]  # fmt: skip
    result = finish(start(*grid), tmp_path / "grid/lr=0.01,rank=4")
    assert result.code == 1 and "2 of 4 trials failed: lr=1e+30,rank=4, lr=1e+30,rank=8" in result.err
    assert "nan" in status(tmp_path / "grid/lr=1e+30,rank=8")["error"].lower()
    assert result.losses == posttrain(*words, "peft.rank=4").losses
    assert (tmp_path / "grid/report.html").exists()
    assert (tmp_path / "grid/best").resolve().parent.name.startswith("lr=0.01")
    assert "trained tok/s" in (result.run_dir / "logs/console.log").read_text()
    again = finish(start(*grid[:2], "optimizer.lr=1e-2,1e-2", "peft.rank=4,8", grid[-1]), result.run_dir)
    assert again.code == 0 and "2 of 2 trials are finished already" in again.err


def test_a_run_on_two_nodes_is_preempted_and_goes_on(start, slurm, tmp_path):
    run_dir = tmp_path / "run"
    process = start("launch.submit=true", "launch.nnodes=2", "trainer.max_steps=60", "optimizer.lr=1e-3",
                    f"hydra.run.dir={run_dir}")  # fmt: skip
    until_trained(run_dir, 3)
    subprocess.run(["scancel", "--signal=USR2", job(run_dir)], env=slurm, check=True)
    result = finish(process, run_dir)
    assert result.code == 0 and status(run_dir)["state"] == "finished"
    console = (run_dir / "logs/console.log").read_text()
    assert "stopped by SIGUSR2 after saving" in console and "going on after step" in console
    assert [line["step"] for line in result.metrics if "loss" in line] == list(range(1, 61))


def test_cancelled_ended_and_taken_up_again(start, slurm, tmp_path):
    run_dir = tmp_path / "run"
    words = ["launch.submit=true", "trainer.max_steps=100000", "optimizer.lr=1e-3", f"hydra.run.dir={run_dir}"]
    first = start(*words)
    until_trained(run_dir, 3)
    first.send_signal(signal.SIGINT)  # the command leaves, its job doesn't
    left = finish(first, run_dir)
    assert left.code == 130 and "the same command waits" in left.err
    second = start(*words)
    time.sleep(3)
    subprocess.run(["scancel", job(run_dir)], env=slurm, check=True)
    result = finish(second, run_dir)
    assert "already" in result.err and result.code == 1
    assert status(run_dir)["state"] == "stopped"


def test_a_rank_killed_on_the_other_node(start, slurm, tmp_path):
    run_dir = tmp_path / "run"
    process = start("launch.submit=true", "launch.nnodes=2", "trainer.max_steps=100000", "optimizer.lr=1e-3",
                    f"hydra.run.dir={run_dir}")  # fmt: skip
    until_trained(run_dir, 3)
    ranks = [
        p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"][-2:] == ["posttrain.worker", str(run_dir)]
    ]
    assert len(ranks) == 2
    next(p for p in ranks if p.environ()["RANK"] == "1").kill()
    result = finish(process, run_dir)
    assert result.code == 1 and status(run_dir)["state"] == "failed"
    assert "rank 1 was killed by SIGKILL" in result.err
    assert not subprocess.run(["squeue", "-h"], env=slurm, check=True, capture_output=True, text=True).stdout


def test_what_slurm_refuses(start, tmp_path):
    submit = ["launch.submit=true", "optimizer.lr=1e-3"]
    result = finish(
        start(*submit, "hydra.launcher.partition=nowhere", f"hydra.run.dir={tmp_path / 'a'}"), tmp_path / "a"
    )
    assert result.code == 2 and "Invalid partition" in result.err and "partitions: high, low, main" in result.err
    assert status(tmp_path / "a")["state"] == "failed"
    result = finish(start(*submit, "hydra.launcher.mem_gb=99999", f"hydra.run.dir={tmp_path / 'b'}"), tmp_path / "b")
    assert result.code == 2 and "mem_gb=99999" in result.err
