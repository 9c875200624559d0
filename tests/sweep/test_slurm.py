"""What is asked of Slurm, and what is said where there is none; jobs on a real one: tests/e2e/test_slurm_cluster.py."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.report.trials import read_trial
from posttrain.sweep import dry_run, slurm
from posttrain.sweep.optuna import Search

SEARCH = ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-5,1e-3))", "peft.rank=8,16"]


def posttrain(folder, *words, path=None):
    """Run `python -m posttrain` in a folder, with its commands or those of `path`."""
    command = [sys.executable, "-m", "posttrain", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "PATH": path or str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def busy_slurm(folder):
    """A PATH with a Slurm that takes every job and starts none; see tests/e2e/test_slurm_cluster.py for a real one."""
    folder.mkdir()
    programs = {
        "sbatch": "echo Submitted batch job 7",
        "squeue": "echo '7|PENDING|Priority|'; echo '7_0|PENDING|Priority|'",
    }
    for name in ("sbatch", "squeue", "srun"):
        program = folder / name
        program.write_text(f"#!/bin/sh\n{programs.get(name, '')}\n")
        program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def interrupted(folder, command, path):
    """Type a command and Ctrl-C once its job waits; returns the lines on standard error."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "PATH": path}
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=said)
        deadline = time.monotonic() + 60
        while not re.search("job 7|_0, ", (folder / "said").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT, (folder / "said").read_text()
    return (folder / "said").read_text().splitlines()


@pytest.mark.parametrize(
    "words, stopped",
    [
        (["launch.submit=true"], "stopped by SIGINT"),
        (
            ["hydra/launcher=slurm", "--multirun", "seed=1,1"],
            "stopped by SIGINT: 0 of 1 trials finished, 1 in the queue",
        ),
    ],
)
def test_a_command_that_leaves_its_jobs_names_the_one_that_waits_for_them(tmp_path, words, stopped):
    pytest.importorskip("submitit")
    path = busy_slurm(tmp_path / "bin")
    first = interrupted(tmp_path, [sys.executable, "-m", "posttrain", *words], path)
    assert first[-2] == f"posttrain: {stopped}"
    assert any("1 job keeps running; `scancel 7` ends what is left" in line for line in first)
    again = re.fullmatch("posttrain: to (?:wait for the job again|continue): (.*)", first[-1])[1]
    second = interrupted(tmp_path, shlex.split(again), path)
    assert any("is already in the queue as job 7" in line for line in second)
    assert second[-2:] == first[-2:]


def options(*words):
    return slurm.options_of(compose(["hydra/launcher=slurm", *words], with_hydra=True).hydra.launcher)


def test_the_options_in_a_script(tmp_path):
    pytest.importorskip("submitit")
    asked = options(
        "hydra.launcher.partition=gpu", "launch.nnodes=2", "hydra.launcher.gpus_per_node=4",
        "hydra.launcher.mem_gb=1.5",
        "hydra.launcher.time=1-0", "hydra.launcher.setup=[module load cuda]", "+hydra.launcher.sbatch.nodelist=n1",
        "hydra.launcher.container_image=a.sqsh", "hydra.launcher.signal_delay_s=60",
    )  # fmt: skip
    text = slurm.script(asked, tmp_path)
    for line in ("partition=gpu", "nodes=2", "gpus-per-node=4", "mem=1536M", "time=1-0", "nodelist=n1",
                 "signal=USR2@60", "ntasks-per-node=1", "requeue"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert (
        "module load cuda\n" in text and "--kill-on-bad-exit=1 --container-image=a.sqsh python -u -m submitit" in text
    )
    assert "--time" not in slurm.script(options(), tmp_path)


@pytest.mark.parametrize("asked", [[], ["hydra.launcher.container_image=a.sqsh"]])
def test_the_script_is_the_one_that_submitit_submits(tmp_path, monkeypatch, asked):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda _: 2)  # it looks for srun
    executor = slurm.make_executor(options(*asked), tmp_path)
    text = executor._make_submission_file_text(executor._submitit_command_str, "uid")
    assert text == slurm.script(options(*asked), tmp_path) and "--array" not in text
    executor.parameters["map_count"] = 3
    assert executor._make_submission_file_text(executor._submitit_command_str, "uid") == slurm.script(
        options(*asked), tmp_path, 3
    )


@pytest.mark.parametrize(
    "words, said, started, trained",
    [
        (
            ["launch.submit=true", "launch.nnodes=2"],
            "#SBATCH --nodes=2",
            "one task on each of 2 nodes",
            ["layout: 2 nodes x 4 GPUs: 8 processes, data parallel 8\n", " trainer.global_batch_size=16\n"],
        ),
        (
            ["hydra/launcher=slurm", "--multirun", "seed=1,2", "peft=lora,none"],
            "#SBATCH --array=0-3%4",
            "of each of the 4 trials, srun starts one task on one node; the task",
            [
                "model: demo:smollm2_135m, LoRA of rank 16 on all-linear | demo:smollm2_135m, all weights\n",
                "trial 1: seed=1 peft=lora\n",
                "trial 4: seed=2 peft=none\n",
                "/TRIAL\n",
            ],
        ),
        (
            ["hydra/launcher=slurm", "--multirun", *SEARCH, "hydra.sweeper.n_trials=20", "sweep.parallel=3"],
            "#SBATCH --array=0-2%3",
            "of each trial, srun starts one task on one node; the task",
            [
                "LoRA of rank 8 on all-linear | demo:smollm2_135m, LoRA of rank 16 on all-linear\n",
                "search: 20 trials at most, 3 at a time (sweep.parallel): an array of 3 jobs is submitted when all",
                "values: optimizer.lr=tag(log,interval(1e-5,1e-3)) peft.rank=8,16: the search proposes them, later",
            ],
        ),
    ],
)
def test_a_dry_run_shows_the_job_and_leaves_nothing(tmp_path, words, said, started, trained):
    pytest.importorskip("submitit")
    if "hydra/sweeper=optuna" in words:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    settings = ["hydra.launcher.dry_run=true", "hydra.launcher.gpus_per_node=4", "trainer.global_batch_size=16"]
    done = posttrain(tmp_path, *words, *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n") and said in done.stdout and "srun --unbuffered" in done.stdout
    assert f"{tmp_path}/outputs/" in done.stdout
    assert started in done.stderr and "starts 4 processes: python -m posttrain.launch.worker" in done.stderr
    for text in ["data: demo:sentences\n", "10 steps, each of 16 sequences of 256 tokens", *trained]:
        assert text in done.stderr
    assert "nothing was submitted or written" in done.stderr
    assert "no time limit is set" in done.stderr and "python -m posttrain options hydra/launcher" in done.stderr
    assert not any(tmp_path.iterdir())


def test_checked_by_what_the_nodes_have():
    words = ["launch.nnodes=2", "trainer.global_batch_size=8"]
    slurm.check_run(compose(words), options(*words, "hydra.launcher.gpus_per_node=4"))
    with pytest.raises(UserError, match="must be a multiple"):
        slurm.check_run(compose(words), options(*words, "hydra.launcher.gpus_per_node=3"))


@pytest.mark.parametrize(
    "words, gpus, advice",
    [
        (
            ["trainer.global_batch_size=2"],
            8,
            "= 1 x 8 = 8 (8 processes: hydra.launcher.gpus_per_node=8); trainer.global_batch_size=8 or "
            "hydra.launcher.gpus_per_node=2 would do",
        ),
        (
            ["trainer.global_batch_size=12", "launch.nnodes=2"],
            4,
            "(8 processes: hydra.launcher.gpus_per_node=4, on each of launch.nnodes=2); trainer.global_batch_size=16 "
            "or hydra.launcher.gpus_per_node=3 would do",
        ),
        (
            ["model=llama3_8b", "parallelism=tp8"],
            1,
            "= 8 x 1 x 1 = 8 (1 process: hydra.launcher.gpus_per_node=1); hydra.launcher.gpus_per_node=8 would do",
        ),
        (["parallelism.nproc_per_node=4"], 2, "add hydra.launcher.gpus_per_node=4"),
    ],
)
def test_where_the_number_of_processes_comes_from(words, gpus, advice):
    asked = options(*words, f"hydra.launcher.gpus_per_node={gpus}")
    with pytest.raises(UserError) as error:
        slurm.check_run(compose(words), asked)
    assert str(error.value).endswith(advice)
    # What is advised is accepted, each override alone.
    for override in re.findall(r"[\w.]+=\d+(?= or | would do|$)", advice):
        better = [*words, override]
        launcher = better if override.startswith("hydra") else words
        cfg = compose([word for word in better if not word.startswith("hydra")])
        slurm.check_run(cfg, options(f"hydra.launcher.gpus_per_node={gpus}", *launcher))


def test_submit_stands_for_the_launcher():
    assert slurm.with_launcher(["launch.submit=true"]) == ["launch.submit=true", slurm.LAUNCHER]
    assert slurm.with_launcher(["launch.submit=true", "hydra/launcher=mine"])[1:] == ["hydra/launcher=mine"]
    assert slurm.with_launcher(["seed=1"]) == ["seed=1"]


def test_a_search_of_one_trial_at_a_time(tmp_path, capsys):
    pytest.importorskip("submitit")
    job = dry_run.PlannedJob(options(), tmp_path, compose([]), [], {"seed": "1,2"}, Search(trials=5, at_once=1))
    dry_run.show([job])
    shown = capsys.readouterr()
    assert "--array" not in shown.out
    assert "search: 5 trials at most, one at a time (sweep.parallel): a job is submitted when the one" in shown.err


def test_a_grid_in_a_file(tmp_path):
    """Each of its trials is shown, and checked before one begins."""
    pytest.importorskip("submitit")
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n      peft.rank: 4,0\n",
        encoding="utf-8",
    )
    words = ["--config-dir", str(tmp_path), "experiment=mine", "--multirun"]
    done = posttrain(tmp_path, *words, "hydra/launcher=slurm", "hydra.launcher.dry_run=true", "peft.rank=2")
    assert "#SBATCH --array=0-1%2\n" in done.stdout, done.stderr
    assert "of each of the 2 trials, srun" in done.stderr and "trial 2: seed=2 peft.rank=2\n" in done.stderr
    done = posttrain(tmp_path, *words)
    assert done.returncode == 2 and "trial seed=1 peft.rank=0: `peft.rank=0`: " in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [file.parent]


@pytest.mark.parametrize("space", ["+hydra.sweeper.params.seed='1,2'", "hydra.sweeper.params={seed: '1,2'}"])
def test_a_space_on_the_command_line_is_a_file_s(space):
    with pytest.raises(UserError, match=r"is a file's; here the keys themselves: --multirun seed=1,2$"):
        compose([space], with_hydra=True)


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
    done = posttrain(tmp_path, *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not any(tmp_path.iterdir())


def test_a_slurm_that_does_not_answer_is_one_line(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, script in (("sbatch", ""), ("squeue", "echo 'squeue: error: no socket' >&2; echo more >&2; exit 1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = posttrain(tmp_path, "launch.submit=true", path=f"{tmp_path}/bin:/bin:/usr/bin")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Slurm doesn't answer (squeue: error: no socket); hydra.launcher.dry_run=true shows" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_submitted_trial_has_the_record_of_its_command(tmp_path):
    """With a Slurm that takes each job and loses it."""
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    says = {"sbatch": "Submitted batch job 7", "squeue": "", "scontrol": "", "srun": ""}
    for name, line in says.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho '{line}'\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "my.yaml").write_text("peft: dora\n", encoding="utf-8")
    words = ["my.yaml", "--multirun", "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0"]
    done = posttrain(tmp_path, *words, "hydra.sweep.dir=sweep", path=f"{tmp_path}/bin:/bin:/usr/bin")
    assert "2 of 2 trials failed" in done.stderr, done.stderr
    for seed in (1, 2):
        trial = read_trial(tmp_path / "sweep" / f"seed={seed}", tmp_path)
        assert trial.file == "my.yaml" and trial.overrides == ["peft=dora", f"seed={seed}"]
        assert trial.groups["peft"] == "dora" and trial.groups["data"] == "demo"


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
