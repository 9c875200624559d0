"""Runs and trials as jobs of a real Slurm: two emulated nodes on this machine, from the optional shared test data.

Needs root, minutes, and installs Debian packages where Slurm is missing: only with POSTTRAIN_TEST_SLURM=1.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grid_rows
import psutil
import pytest
from commands import ROOT, Result, environment

DOWNLOAD_S = 60
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}


@pytest.fixture(scope="module")
def slurm(shared):
    """A cluster; its environment variables."""
    if os.environ.get("POSTTRAIN_TEST_SLURM") != "1":
        pytest.skip("takes minutes, and installs what is missing of Slurm: set POSTTRAIN_TEST_SLURM=1")
    folder = shared / "slurm"
    if not (folder / "start.sh").is_file():
        pytest.skip(f"optional shared test data: no {folder}/start.sh")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    install()
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge wants a path that everybody may walk, which pytest's isn't
    root.chmod(0o711)
    env = {**os.environ, "SLURM_ROOT": str(root), "GPUS": "0", "GRACE": "60"}
    try:
        begin(folder, env)
        # Slurm holds a job that is queued again for two minutes; this lets it go after eight seconds.
        shorter = subprocess.Popen([folder / "nowait.sh", "3600"], env=env)
        try:
            sourced = subprocess.run(
                ["bash", "-c", f". {root}/env && env -0"], env=env, check=True, capture_output=True
            )
            yield dict(line.split("=", 1) for line in sourced.stdout.decode().split("\0") if "=" in line)
        finally:
            shorter.terminate()
            shorter.wait()
    finally:
        subprocess.run([folder / "stop.sh"], env=env, check=True, timeout=200, stdout=subprocess.DEVNULL)
        shutil.rmtree(root)


def install():
    """Debian's packages, where they are missing."""
    missing = [package for command, package in PACKAGES.items() if not shutil.which(command)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        pytest.skip(f"no {', '.join(missing)}, and no apt-get")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # no services
    get = f"apt-get install -qq -y --no-install-recommends {' '.join(missing)}"
    # What waits for a network may be ended, what changes the system may not.
    download = [
        "timeout",
        "--kill-after=5",
        str(DOWNLOAD_S),
        "sh",
        "-c",
        f"apt-get update -qq && {get} --download-only",
    ]
    for command in (download, get.split()):
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Slurm can't be installed here: {done.stderr.strip().splitlines()[-1:]}")


def begin(folder, env):
    """Start the daemons, on ports that the system gives to nobody else by itself."""
    for attempt in range(3):
        env["CTLPORT"] = str(17000 + 10 * (os.getpid() % 1000) + 3 * attempt)
        begun = subprocess.run([folder / "start.sh"], env=env, capture_output=True, text=True)
        if begun.returncode == 0:
            return
        subprocess.run([folder / "stop.sh"], env=env, check=True, stdout=subprocess.DEVNULL)
    raise AssertionError(begun.stderr)


@pytest.fixture
def ask(slurm):
    """Run one of Slurm's commands; returns what it says."""

    def run(*command):
        return subprocess.run(command, env=slurm, check=True, capture_output=True, text=True).stdout

    return run


@pytest.fixture
def start(slurm, posttrain, words, tmp_path):
    """Start a command whose jobs go to the cluster."""
    begun = []
    fixed = [word for word in words if not word.startswith("optimizer.lr")]
    options = ["hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_node=8", "hydra.launcher.poll_s=0.5"]

    def go(*more, last=()):
        command = [sys.executable, "-m", "posttrain", *fixed, *more, *options, *last]
        # Slurm gives a job the environment that it was submitted from.
        env = {**environment(posttrain.cache), **{name: slurm[name] for name in ("PATH", "SLURM_CONF")},
               "PYTHONPATH": str(ROOT)}  # fmt: skip
        said = [tmp_path / f"command{len(begun)}.{kind}" for kind in ("out", "err")]
        with open(said[0], "w") as out, open(said[1], "w") as err:
            begun.append(
                subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=err, preexec_fn=listens_to_ctrl_c)
            )
        begun[-1].said = said
        return begun[-1]

    yield go
    for process in begun:
        if process.poll() is None:
            process.kill()
    subprocess.run(["scancel", "--signal=KILL", "--user=root"], env=slurm, check=True)
    deadline = time.monotonic() + 120
    while subprocess.run(["squeue", "-h"], env=slurm, check=True, capture_output=True).stdout:
        assert time.monotonic() < deadline, "jobs are left"
        time.sleep(0.2)


def listens_to_ctrl_c():
    """A shell that started these tests in the background may have taken that from them, and so from their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process, run_dir, timeout=240):
    process.wait(timeout)
    out, err = (path.read_text() for path in process.said)
    assert "Traceback" not in err
    return Result(process.returncode, out, err, run_dir)


def until(state, process):
    """Wait until `state()` is true of a command that goes on."""
    deadline = time.monotonic() + 240
    while not state():
        assert process.poll() is None and time.monotonic() < deadline, process.said[1].read_text()
        time.sleep(0.1)


def until_trained(process, run_dir, steps):
    """Wait for so many logged steps of a command's run."""
    metrics = run_dir / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= steps, process)


def status(directory):
    return json.loads((directory / "status.json").read_text())


def job(run_dir):
    return json.loads((run_dir / "slurm.json").read_text())["job"]


def steps(result):
    return [line["step"] for line in result.metrics if "loss" in line]


def ranks(run_dir):
    """The run's processes, by rank."""
    command = ["posttrain.launch.worker", str(run_dir)]
    found = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == command]
    return sorted(found, key=lambda process: process.environ()["RANK"])


@contextlib.contextmanager
def held(run_dir):
    """Ranks that stand still until they are told to save, so that a short run is caught in the middle."""
    left = ranks(run_dir)
    assert left
    try:
        for process in left:
            process.suspend()
        yield
        deadline = time.monotonic() + 120
        while left:
            assert time.monotonic() < deadline
            for process in left:
                if pending(process.pid, signal.SIGTERM):  # Slurm may have woken it already
                    process.resume()
            _, left = psutil.wait_procs(left, timeout=0.1)
    finally:
        for process in left:
            process.kill()


def pending(pid, number):
    """Whether a signal waits for a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    masks = [line.split()[1] for line in lines if "Pnd:" in line]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.mark.nightly
def test_a_grid_of_two_rank_trials_gives_what_runs_here_give(start, ask, posttrain, words, tmp_path):
    grid_rows.write(tmp_path)
    grid = ["--multirun", "hydra/launcher=slurm", "parallelism=tp2", "optimizer.lr=1e-2", *grid_rows.VALIDATED,
            f"hydra.sweep.dir={tmp_path / 'grid'}"]  # fmt: skip
    names = ("good", "cut", "poor")
    good, bad, poor = ([tmp_path / f"grid/path={name}.jsonl,rank={rank}" for rank in (4, 8)] for name in names)
    result = finish(start(*grid, "data.path=good.jsonl,cut.jsonl", "peft.rank=4,8"), good[0])
    assert result.code == 1
    assert "2 of 4 trials failed: path=cut.jsonl,rank=4, path=cut.jsonl,rank=8" in result.err
    assert all(grid_rows.ERROR in status(trial)["error"] for trial in bad)
    nodes = [ask("squeue", "-h", "-t", "all", "-j", job(trial), "-o", "%N").strip() for trial in (*good, *bad)]
    assert set(nodes) == {"n1", "n2"}
    for trial, rank in zip(good, (4, 8), strict=True):
        here = posttrain(*words, *grid_rows.VALIDATED, "data.path=good.jsonl", f"peft.rank={rank}", "parallelism=tp2",
                         "trainer.export=false", run_dir=tmp_path / f"here{rank}")  # fmt: skip
        found = Result(0, "", "", trial)
        assert found.losses == here.losses
        assert found.summary["val_loss_after"] == here.summary["val_loss_after"]
        assert found.summary["world_size"] == 2
    assert (tmp_path / "grid/report.html").exists()
    assert (tmp_path / "grid/best").resolve().parent in good
    assert "supervised tok/s" in (good[0] / "logs/console.log").read_text()
    before = [(trial / "metrics.jsonl").read_bytes() for trial in good]
    pruner = ["sweep.pruner=median", "sweep.pruner_startup_trials=2", "sweep.pruner_warmup_steps=2"]
    again = finish(start(*grid, "data.path=good.jsonl,poor.jsonl", "peft.rank=4,8", *pruner), good[0])
    assert again.code == 0 and "2 of 4 trials have already finished" in again.err
    assert [(trial / "metrics.jsonl").read_bytes() for trial in good] == before
    assert all(status(trial)["state"] == "pruned" and "after step 2: " in status(trial)["error"] for trial in poor)


@pytest.mark.nightly
def test_a_run_on_two_nodes_reaches_its_time_limit_is_preempted_and_ends(start, ask, tmp_path):
    run_dir = tmp_path / "run"
    process = start("launch.submit=true", "launch.nnodes=2", "trainer.max_steps=200", "optimizer.lr=1e-3",
                    "hydra.launcher.partition=low", f"hydra.run.dir={run_dir}")  # fmt: skip
    until_trained(process, run_dir, 3)
    with held(run_dir):  # Slurm looks at limits every 30 s; 120 s before this one the job wants to be told
        running_s = time.time() - status(run_dir)["started"]
        ask("scontrol", "update", f"JobId={job(run_dir)}", f"TimeLimit={int(running_s / 60) + 2}")
    ask("scontrol", "update", f"JobId={job(run_dir)}", "TimeLimit=60")
    until_trained(process, run_dir, len((run_dir / "metrics.jsonl").read_text().splitlines()) + 3)
    with held(run_dir):
        ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    result = finish(process, run_dir)
    assert result.code == 0 and status(run_dir)["state"] == "finished"
    console = (run_dir / "logs/console.log").read_text()
    assert console.count("stopped by SIGUSR2 after saving") == console.count("resuming after step") == 2
    assert steps(result) == list(range(1, 201))


@pytest.mark.nightly
def test_left_told_to_save_too_often_and_cancelled(start, ask, tmp_path):
    run_dir = tmp_path / "run"
    words = ["launch.submit=true", "trainer.max_steps=100000", "optimizer.lr=1e-3", "hydra.launcher.max_requeues=0",
             f"hydra.run.dir={run_dir}"]  # fmt: skip
    first = start(*words)
    until_trained(first, run_dir, 3)
    first.send_signal(signal.SIGINT)  # the command leaves, its job doesn't
    left = finish(first, run_dir)
    assert left.code == 130 and "to wait for the job again: " in left.err

    second = start(*words)
    until(lambda: "already" in second.said[1].read_text(), second)
    ask("scancel", "--signal=USR2", job(run_dir))
    result = finish(second, run_dir)
    assert "already" in result.err and result.code == 1
    assert "was queued again 0 times (hydra.launcher.max_requeues); the same command resumes it" in result.err
    assert status(run_dir)["state"] == "stopped"

    trained = len(steps(result))
    third = start(*words)
    until_trained(third, run_dir, trained + 3)
    ask("scancel", job(run_dir))
    result = finish(third, run_dir)
    assert result.code == 1 and status(run_dir)["state"] == "stopped"
    assert "resuming after step" in (run_dir / "logs/console.log").read_text()


def test_a_node_goes_away(start, ask, slurm, tmp_path):
    lost, other = (tmp_path / f"grid/lr={lr}" for lr in ("0.001", "0.002"))
    process = start("--multirun", "hydra/launcher=slurm", "optimizer.lr=1e-3,2e-3", "trainer.max_steps=100",
                    "checkpoint.save_interval=2", f"hydra.sweep.dir={lost.parent}")  # fmt: skip
    until_trained(process, lost, 5)
    for rank in ranks(lost):
        rank.suspend()
    until_trained(process, other, 1)
    node, left = (ask("squeue", "-h", "-t", "all", "-j", job(run_dir), "-o", "%N").strip() for run_dir in (lost, other))
    switch_off(node, slurm)
    try:  # Slurm notices it after its SlurmdTimeout; here it is told
        ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        result = finish(process, lost)
    finally:
        switch_on(node, left, slurm)
    assert result.code == 0 and [status(run_dir)["state"] for run_dir in (lost, other)] == ["finished"] * 2
    assert steps(result) == steps(Result(0, "", "", other)) == list(range(1, 101))
    assert "lr=0.001: waits in the queue" in result.err and f"lr=0.001: runs on {left}" in result.err
    assert "resuming after step" in (lost / "logs/console.log").read_text()
    assert "resuming after step" not in (other / "logs/console.log").read_text()
    assert "Restarts=1" in ask("scontrol", "show", "job", job(lost))
    assert not ask("squeue", "-h") and not ranks(lost) and not ranks(other)


def switch_off(node, slurm):
    """End everything of a node at once, Slurm's daemon first."""
    daemon = psutil.Process(int(pid_file(node, slurm).read_text()))
    daemon.kill()
    found = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == node]
    above = {parent for process in found for parent in process.parents() if parent.name().startswith("slurmstepd")}
    for process in [*above, *found]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def switch_on(node, neighbour, slurm):
    """Start a node's daemon where its neighbour's sees the nodes' names; wait until it is back."""
    command = f"slurmd -f {slurm['SLURM_CONF']} -N {node}"
    space = f"/proc/{pid_file(neighbour, slurm).read_text().strip()}/ns/mnt"
    subprocess.run(f"nsenter --mount={space} {command} || {command}", shell=True, env=slurm, check=True)
    deadline = time.monotonic() + 120
    while (
        "idle"
        not in subprocess.run(
            ["sinfo", "-h", "-n", node, "-o", "%t"], env=slurm, capture_output=True, text=True
        ).stdout.split()
    ):
        assert time.monotonic() < deadline
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], env=slurm, capture_output=True)
        time.sleep(0.5)


def pid_file(node, slurm):
    return Path(slurm["SLURM_CONF"]).parents[1] / f"pids/slurmd-{node}.pid"


def test_a_rank_killed_on_the_other_node(start, ask, tmp_path):
    run_dir = tmp_path / "run"
    process = start("launch.submit=true", "launch.nnodes=2", "trainer.max_steps=100000", "optimizer.lr=1e-3",
                    f"hydra.run.dir={run_dir}")  # fmt: skip
    until_trained(process, run_dir, 3)
    _, other = ranks(run_dir)
    other.kill()
    result = finish(process, run_dir)
    assert result.code == 1 and status(run_dir)["state"] == "failed"
    assert "rank 1 was killed by SIGKILL" in result.err
    assert not ask("squeue", "-h") and not ranks(run_dir)


@pytest.mark.parametrize(
    ("option", "said"),
    [("partition=nowhere", "partitions: high, low, main"), ("mem_gb=99999", "mem_gb=99999"),
     ("gpus_per_node=16", "gpus_per_node=16")],
)  # fmt: skip
def test_what_slurm_refuses(option, said, start, tmp_path):
    run_dir = tmp_path / "run"
    submit = ["launch.submit=true", "optimizer.lr=1e-3", "trainer.global_batch_size=16"]
    result = finish(start(*submit, f"hydra.run.dir={run_dir}", last=[f"hydra.launcher.{option}"]), run_dir)
    assert result.code == 2 and said in result.err
    assert status(run_dir)["state"] == "failed"
