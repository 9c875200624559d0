"""A real `--multirun` of the launcher, with trials that take no time."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from posttrain.errors import UserError
from posttrain.sweep.local import shares
from posttrain.sweep.trial import Share, Trial

pytestmark = pytest.mark.nightly

TASK = Path(__file__).with_name("quick_task.py")
GRID = ["optimizer.lr=1e-4,3e-4", "peft.rank=8,8"]
NAMES = ["lr=0.0001,rank=8", "lr=0.0003,rank=8"]


def start(cwd, *overrides):
    command = [sys.executable, str(TASK), "--multirun", "launch.prestart=false", *overrides]  # nothing is trained
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def sweep(cwd, *overrides):
    process = start(cwd, *overrides)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def runs(directory):
    """Trial -> how often it was run."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in sorted(directory.glob("*/runs.log"))}


def state(directory):
    return json.loads((directory / "status.json").read_text())


def test_a_grid_is_run_once_and_grows(tmp_path):
    code, out, err = sweep(tmp_path, *GRID)
    assert code == 0, err
    (directory,) = (tmp_path / "outputs/sweeps").iterdir()
    assert runs(directory) == dict.fromkeys(NAMES, 1)
    assert (directory / "report.html").exists()
    assert (directory / "best").resolve().parent.name == "lr=0.0003,rank=8"
    assert re.search(r"\* 1 +0.0003 +0.125", out)

    code, out, err = sweep(tmp_path, "optimizer.lr=1e-4,3e-4", "peft.rank=8,32", "logger=tensorboard")
    assert code == 0 and "2 of 4 trials have already finished" in err
    assert set(runs(directory).values()) == {1} and len(runs(directory)) == 4
    assert (directory / "best").resolve().parent.name == "lr=0.0003,rank=32"
    assert len(list((tmp_path / "outputs/sweeps").iterdir())) == 1


@pytest.mark.every_run
def test_failing_trials_do_not_stop_the_rest_and_are_tried_again(tmp_path):
    # 1 fails, 2 is killed, rank 0 is refused before it starts
    code, out, err = sweep(tmp_path, "seed=1,2,5", "peft.rank=8,0", f"hydra.sweep.dir={tmp_path / 'here'}")
    assert code == 1
    assert "5 of 6 trials failed" in err
    here = tmp_path / "here"
    assert state(here / "rank=8,seed=5")["state"] == "finished"
    assert "loss is NaN" in state(here / "rank=8,seed=1")["error"]
    assert "killed by SIGKILL" in state(here / "rank=8,seed=2")["error"]
    assert "peft.rank" in state(here / "rank=0,seed=5")["error"]
    assert "rank=8,seed=2: was killed by SIGKILL" in out
    sweep(tmp_path, "seed=1,5", "peft.rank=8,8", f"hydra.sweep.dir={here}")
    assert (runs(here)["rank=8,seed=5"], runs(here)["rank=8,seed=1"]) == (1, 2)


def test_several_at_once_share_the_cores(tmp_path):
    cores = os.sched_getaffinity(0)
    code, out, err = sweep(tmp_path, *GRID, "seed=4", "sweep.parallel=2", "sweep.name=both")
    assert code == 0, err
    directory = tmp_path / "outputs/sweeps/both"
    if len(cores) > 1:
        logs = [json.loads(path.read_text()) for path in directory.glob("*/runs.log")]
        assert all(len(log["cores"]) < len(cores) for log in logs)
    assert "a line of the trial's own" not in out + err
    assert "a line of the trial's own" in (directory / NAMES[0] / "logs/console.log").read_text()


def test_a_name_for_other_settings_is_refused(tmp_path):
    assert sweep(tmp_path, "peft.rank=8,16", "sweep.name=x")[0] == 0
    code, _, err = sweep(tmp_path, "peft.rank=8,16", "sweep.name=x", "seed=7")
    assert code == 2 and "seed: 1234 -> 7" in err and "Traceback" not in err


def write_data(directory, answer):
    """rows.jsonl and validation.jsonl of one conversation each."""
    for name in ("rows", "validation"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        (directory / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")


def test_a_grid_gone_on_with_over_other_rows(tmp_path):
    """Replaced rows make another trial of the same values: trained anew, beside the old ones, and ranked apart."""
    words = ["data=messages", "data.path=rows.jsonl", "data.validation_path=validation.jsonl", "sweep.name=x"]
    write_data(tmp_path, "b")
    assert sweep(tmp_path, *words, "optimizer.lr=1e-4,3e-4")[0] == 0
    directory = tmp_path / "outputs/sweeps/x"
    assert runs(directory) == {"lr=0.0001": 1, "lr=0.0003": 1}

    write_data(tmp_path, "c")
    code, out, err = sweep(tmp_path, *words, "optimizer.lr=1e-4,5e-4")
    assert code == 0 and "already finished" not in err, err
    assert "lr=0.0001: was made with other data and validation; with those of now it is lr=0.0001,inputs=" in err
    names = [re.sub("=[0-9a-f]{8}$", "", name) for name in runs(directory)]
    assert sorted(names) == ["lr=0.0001", "lr=0.0001,inputs", "lr=0.0003", "lr=0.0005"]
    assert (directory / "best").resolve().parent.name.startswith(("lr=0.0001,inputs", "lr=0.0005"))
    latest, others = out.split("made or validated with other files")
    assert "0.0005" in latest and "0.0003" not in latest and "0.0003" in others

    code, _, err = sweep(tmp_path, *words, "optimizer.lr=1e-4,5e-4")
    assert code == 0 and "2 of 2 trials have already finished" in err
    write_data(tmp_path, "b")
    code, _, err = sweep(tmp_path, *words, "optimizer.lr=1e-4,3e-4")
    assert code == 0 and "2 of 2 trials have already finished" in err
    assert set(runs(directory).values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_reaches_the_trial_and_starts_no_more(tmp_path, number):
    process = start(tmp_path, "seed=3,5", f"hydra.sweep.dir={tmp_path / 'here'}")
    running = tmp_path / "here/seed=3/status.json"
    deadline = time.time() + 60
    while not running.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert state(tmp_path / "here/seed=3")["state"] == "stopped" or number != signal.SIGINT
    assert not (tmp_path / "here/seed=5").exists()
    assert "Traceback" not in err
    assert f"stopped by {number.name}: 0 of 2 trials finished, 1 " in err and ", 1 not begun\n" in err


def stopped_sweep(cwd, *overrides):
    """Stop a sweep once its trial of seed 3 has begun, which waits; returns its last two lines."""
    process = start(cwd, *overrides)
    deadline = time.time() + 60
    while not list(cwd.glob("outputs/sweeps/*/*seed=3*/status.json")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    return err.splitlines()[-2:]


def typed_again(cwd, advice):
    """Type the command that a stopped sweep has named; returns what it says on standard error."""
    command = advice.partition("to continue: ")[2]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    again = subprocess.run(command, shell=True, cwd=cwd, env=env, text=True, capture_output=True, timeout=120)
    assert again.returncode == 0, again.stderr
    return again.stderr


@pytest.mark.every_run
def test_a_stopped_sweep_says_what_is_done_and_the_command_that_goes_on(tmp_path):
    """Started afresh, this one would make another directory, and refuse the trial that has begun."""
    words = ["seed=5,3,1,7", "sweep.name='a b ${now:%f}'", "run.resume=never"]
    done, advice = stopped_sweep(tmp_path, *words)
    assert done == "posttrain: stopped by SIGINT: 1 of 4 trials finished, 1 interrupted, 2 not begun"
    (directory,) = (tmp_path / "outputs/sweeps").iterdir()
    again = advice.partition("to continue: ")[2]
    assert "run.resume=auto" in again and "run.resume=never" not in again
    again = again.replace("seed=5,3,1,7", "seed=5,3,7")  # 1 fails
    assert "1 of 3 trials have already finished" in typed_again(tmp_path, f"to continue: {again}")
    assert runs(directory) == {"seed=3": 2, "seed=5": 1, "seed=7": 1}
    assert list((tmp_path / "outputs/sweeps").iterdir()) == [directory]


def test_a_stopped_search_goes_on_by_the_command_that_it_names(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "seed=choice(3,5)", "peft.rank=range(1,256)",
              "hydra.sweeper.n_trials=6", "sweep.name=search"]  # fmt: skip
    done, advice = stopped_sweep(tmp_path, *search)
    before = runs(tmp_path / "outputs/sweeps/search")
    assert f"{len(before) - 1} of 6 trials finished, 1 interrupted" in done
    typed_again(tmp_path, advice)
    after = runs(tmp_path / "outputs/sweeps/search")
    assert len(after) == 6
    assert sorted(after[name] for name in before) == [1] * (len(before) - 1) + [2]


def test_a_stopped_search_without_a_seed_says_what_can_be_continued(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    _, advice = stopped_sweep(
        tmp_path, "hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=null", "seed=choice(3,3)", "sweep.name=search"
    )
    assert "hydra.sweeper.sampler.seed=null: without a seed" in advice
    assert advice.endswith("--resume outputs/sweeps/search/TRIAL")


def test_a_search_goes_on_where_it_was(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-5,1e-3))", "sweep.name=search"]
    assert sweep(tmp_path, *search, "hydra.sweeper.n_trials=2")[0] == 0
    directory = tmp_path / "outputs/sweeps/search"
    first = runs(directory)
    assert len(first) == 2
    code, out, _ = sweep(tmp_path, *search, "hydra.sweeper.n_trials=3")
    assert code == 0 and len(runs(directory)) == 3 and first.items() < runs(directory).items()
    assert out.count("val loss") == 1  # one table


@pytest.mark.every_run
def test_shares_of_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share.gpus for share in shares(2, 4)] == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,GPU-1")
    assert [share.gpus for share in shares(2, 3)] == [["5"], ["7", "GPU-1"]]
    assert [share.gpus for share in shares(2, 0)] == [None, None]
    with pytest.raises(UserError, match="there are 2 GPUs"):
        shares(3, 2)
    assert all(share.cores for share in shares(500, 0))


def test_a_trial_sees_its_gpus_and_cores(tmp_path):
    def run(cfg):
        seen = f"{os.environ['CUDA_VISIBLE_DEVICES']} on {os.sched_getaffinity(0)}"
        return JobReturn(status=JobStatus.COMPLETED, _return_value=seen)

    core = min(os.sched_getaffinity(0))
    trial = Trial("a", tmp_path / "a", OmegaConf.create({}))
    trial.start(run, Share(["5", "GPU-1"], {core}), os.open(os.devnull, os.O_WRONLY))
    trial.finish()
    assert (trial.value, trial.error) == (f"5,GPU-1 on {{{core}}}", "")


def test_nine_finished_trials_cost_little(tmp_path):
    grid = ["optimizer.lr=1e-4,2e-4,3e-4", "peft.rank=8,16,32", "sweep.parallel=2", "sweep.name=nine"]
    assert sweep(tmp_path, *grid)[0] == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, _, err = sweep(tmp_path, *grid)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0 and "9 of 9 trials have already finished" in err
    assert set(runs(tmp_path / "outputs/sweeps/nine").values()) == {1}
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took < 30  # seconds of CPU time; 5 on a fast core


def test_a_trial_without_validation_has_just_finished(tmp_path):
    trial = Trial("lr=1", tmp_path, OmegaConf.create())
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert trial.outcome() == "finished"
    trial.value = 2.34567
    assert trial.outcome() == "validation loss 2.346"
