"""What is asked of Slurm, and what is said where there is none; jobs on a real one: tests/e2e/test_slurm_cluster.py."""

import os
import subprocess
import sys

import pytest

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.sweep import slurm


def options(*words):
    return slurm.options_of(compose(["hydra/launcher=slurm", *words], with_hydra=True).hydra.launcher)


def test_the_options_in_a_script(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda _: 2)  # it looks for srun
    asked = options(
        "hydra.launcher.partition=gpu", "launch.nnodes=2", "hydra.launcher.gpus_per_node=4",
        "hydra.launcher.mem_gb=1.5",
        "hydra.launcher.time=1-0", "hydra.launcher.setup=[module load cuda]", "+hydra.launcher.sbatch.nodelist=n1",
        "hydra.launcher.container_image=a.sqsh", "hydra.launcher.signal_delay_s=60",
    )  # fmt: skip
    text = slurm.make_executor(asked, tmp_path)._make_submission_file_text("COMMAND", "uid")
    for line in ("partition=gpu", "nodes=2", "gpus-per-node=4", "mem=1536M", "time=1-0", "nodelist=n1",
                 "signal=USR2@60", "ntasks-per-node=1", "requeue"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert "module load cuda\n" in text and "--kill-on-bad-exit=1 --container-image=a.sqsh COMMAND" in text
    assert "--time" not in slurm.make_executor(options(), tmp_path)._make_submission_file_text("COMMAND", "uid")


def test_checked_by_what_the_nodes_have():
    words = ["launch.nnodes=2", "trainer.global_batch_size=8"]
    slurm.check_run(compose(words), options(*words, "hydra.launcher.gpus_per_node=4"))
    with pytest.raises(UserError, match="must be a multiple"):
        slurm.check_run(compose(words), options(*words, "hydra.launcher.gpus_per_node=3"))


def test_submit_stands_for_the_launcher():
    assert slurm.with_launcher(["launch.submit=true"]) == ["launch.submit=true", slurm.LAUNCHER]
    assert slurm.with_launcher(["launch.submit=true", "hydra/launcher=mine"])[1:] == ["hydra/launcher=mine"]
    assert slurm.with_launcher(["seed=1"]) == ["seed=1"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["launch.submit=true"], "no Slurm on this machine"),
        (["hydra/launcher=slurm", "--multirun", "seed=1,2"], "no Slurm on this machine"),
        (["hydra/launcher=slurm"], "requires launch.submit=true"),
        (["launch.submit=true", "hydra.launcher.partion=x"], "unknown key"),
    ],
)
def test_mistakes(tmp_path, words, said):
    command = [sys.executable, "-m", "posttrain", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_what_is_told_of_a_job_in_the_queue():
    """A lost node, as Slurm tells of it: the job's turn, its nodes, queued again, no node, its nodes again."""
    down = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"
    places = [
        ["PENDING", "Resources", ""], ["RUNNING", "None", "n[1-2]"], ["COMPLETING", "None", "n1"],
        ["PENDING", "BeginTime", ""], ["PENDING", down, ""], ["PENDING", "Resources", ""], ["RUNNING", "None", "n1"],
    ]  # fmt: skip
    said = [slurm.WAITS]
    for place in places:
        said.append(slurm.status_line(place, said[-1]))
    told = [line for line, before in zip(said[1:], said, strict=False) if line != before]
    assert told == ["runs on n[1-2]", slurm.WAITS, f"{slurm.WAITS}: {down}", "runs on n1"]
