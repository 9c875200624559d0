"""Run directories from a stranger: nothing is read, written or removed through what is planted in them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.checkpoint import directories
from posttrain.config import composition, hydra_guard
from posttrain.convert.checkpoints import find
from posttrain.convert.merge import find_adapter
from posttrain.convert.publish import publishing
from posttrain.errors import UserError
from posttrain.evaluate.settings import with_run
from posttrain.generate.load import export_of, open_export, run_of
from posttrain.launch import launcher
from posttrain.report import write_report
from posttrain.report.trials import read_trials
from posttrain.sweep import job
from posttrain.sweep.trial import Trial
from posttrain.utils import rundir

ROOT = Path(__file__).resolve().parents[2]
KEPT = "not the run's to touch\n"


@pytest.fixture
def outside(tmp_path):
    """A folder of the user's, which must be as it was at the end."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True)
    for name in ("file", ".bashrc", ".ssh/id", ".partialx", ".removing-iter_0000002.bak", "iter_1"):
        (folder / name).write_text(KEPT)
    yield folder
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    names = ("file", ".bashrc", ".ssh/id", ".partialx", ".removing-iter_0000002.bak", "iter_1")
    assert found == dict.fromkeys(names, KEPT)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def plant(run_dir, name, outside):
    """A link of the name that a run gives to a file or folder of its own."""
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside / ("file" if "." in path.name.lstrip(".") else ""))
    return path


PLANTED = [*rundir.FILES, *rundir.FOLDERS, "base/config.json", "logs/rank0.log"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_link_where_a_run_writes_is_refused_before_it_starts(name, run_dir, outside):
    path = plant(run_dir, name, outside)
    with pytest.raises(UserError, match="is a link") as refused:
        launcher.launch(composition.compose(["model=hf", "model.path=x"]), run_dir, 0)
    assert str(path) in str(refused.value) and path.is_symlink()
    left = {item.relative_to(run_dir).as_posix() for item in run_dir.rglob("*")}
    assert left <= {name, name.split("/")[0], ".lock"}


@pytest.mark.parametrize("name", [".hydra/overrides.yaml", "logs/rank0.log"])
def test_the_command_refuses_them_by_name(name, run_dir, outside):
    """Of Hydra's own record before it is written, of the others when the run is locked."""
    path = plant(run_dir, name, outside)
    command = [sys.executable, "-m", "posttrain", f"hydra.run.dir={run_dir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"posttrain: {path}: is a link")


def test_a_run_directory_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    launcher.prepare(composition.compose(), tmp_path / "run")
    rundir.check(tmp_path / "run")
    assert (tmp_path / "disk" / "config.yaml").is_file() and (tmp_path / "disk" / "logs").is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.link(path.parent / "other", path)])
def test_a_pipe_a_folder_or_a_hard_link_for_a_log(make, run_dir):
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "other").write_text(KEPT)
    make(run_dir / "logs" / "rank0.log")
    with pytest.raises(UserError, match=r"rank0\.log: is a (pipe|directory|hard link)"):
        rundir.append(run_dir, "logs/rank0.log")
    assert (run_dir / "logs" / "other").read_text() == KEPT


def test_hydras_own_record_is_not_written_through_links(run_dir, outside):
    plant(run_dir, ".hydra/overrides.yaml", outside)
    with pytest.raises(UserError, match=r"overrides\.yaml: is a link"):
        hydra_guard.save_config(composition.compose(), "overrides.yaml", run_dir / ".hydra")
    hydra_guard.save_config(composition.compose(), "config.yaml", run_dir / ".hydra")
    assert "optimizer:" in (run_dir / ".hydra" / "config.yaml").read_text()


@pytest.mark.parametrize("target", ["../home", "../home/.ssh"])
def test_checkpoints_that_lead_elsewhere_are_not_cleaned(target, run_dir, outside):
    (run_dir / "checkpoints").symlink_to(target)
    directories.clean(run_dir / "checkpoints")
    directories.prune(directories.directory(run_dir / "checkpoints", 9), 1, set())
    assert directories.newest(run_dir / "checkpoints") == (None, [])


def test_only_names_of_its_own_are_removed_from_a_folder_of_checkpoints(tmp_path):
    own = [".partial", ".removing-iter_0000002", ".latest_train_state.pt.0123abcd"]
    others = [".git", ".nfs0001", ".partial2", ".removing-iter_2", ".removing-iter_0000002~", ".latest_train_state.pt",
              ".x.0123abcd", ".latest_train_state.pt.0123ABCD"]  # fmt: skip
    for name in own[:2] + others:
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / own[2]).touch()
    directories.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def sealed(root, step):
    partial = directories.directory(root / directories.PARTIAL, step)
    partial.mkdir(parents=True)
    for name in ("__0_0.distcp", "train_state.pt"):
        (partial / name).write_text(KEPT)
    directories.finish(root, step)
    return directories.directory(root, step)


@pytest.mark.parametrize("name", ["__0_0.distcp", directories.SEAL, "more"])
def test_a_checkpoint_with_a_link_or_pipe_in_it_is_passed_over(name, run_dir, outside):
    older, newer, newest = (sealed(run_dir / "checkpoints", step) for step in (2, 4, 6))
    (newer / name).unlink(missing_ok=True)
    (newer / name).symlink_to(outside / "file")
    (newest / name).unlink(missing_ok=True)
    os.mkfifo(newest / name)
    found, skipped = directories.newest(run_dir / "checkpoints", hashes=True)
    assert found == older and "is a pipe" in skipped[0] and "is a link" in skipped[1]


def test_a_checkpoint_that_is_a_link_is_neither_used_nor_followed(run_dir, outside):
    root = run_dir / "checkpoints"
    real = sealed(root, 2)
    other = sealed(run_dir / "others", 9)
    (root / "iter_0000009").symlink_to(other)
    assert directories.newest(root)[0] == real and "is a link" in directories.newest(root)[1][0]
    with pytest.raises(UserError, match="is a link"):
        find(run_dir)
    (damaged,) = directories.prune(sealed(root, 10), 1, set())
    assert "iter_0000009: is a link" in damaged
    directories.remove(root / "iter_0000009")
    assert directories.problem(other, hashes=True) is None and not (root / "iter_0000009").is_symlink()


def write_run(run_dir):
    (run_dir / "config.yaml").write_text("model: {}\n")
    (run_dir / "status.json").write_text('{"state": "finished"}')
    (run_dir / "summary.json").write_text('{"val_loss_after": 1.0}')


def special(path, what, outside):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if what == "a link":
        path.symlink_to(outside / "file")
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.truncate(100 << 30)


@pytest.mark.parametrize("what", ["a link", "a pipe", "more than"])
@pytest.mark.parametrize(
    "name", ["config.yaml", "status.json", "summary.json", "metrics.jsonl", "samples.jsonl", ".hydra/overrides.yaml"]
)
def test_a_report_reads_plain_files_alone(name, what, run_dir, outside, monkeypatch):
    monkeypatch.setattr(rundir, "LONG", 1 << 20)
    write_run(run_dir)
    special(run_dir / name, what, outside)
    started = time.monotonic()
    if name in ("config.yaml", "status.json") and what != "more than":
        with pytest.raises(UserError, match=rf"{name}: is {what}|no run in it"):
            read_trials(run_dir)
    else:
        with pytest.raises(UserError, match=rf"{name}: (is|has) {what}"):
            read_trials(run_dir)
        (trial,) = read_trials(run_dir.parent)  # among others it is shown as damaged
        assert trial.state == "damaged" and name in trial.error and not trial.summary
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("what", ["a link", "a pipe", "more than"])
def test_a_strangers_run_is_converted_and_evaluated_from_plain_files_alone(what, run_dir, outside):
    write_run(run_dir)
    special(run_dir / "config.yaml", what, outside)
    sealed(run_dir / "checkpoints", 2)
    with pytest.raises(UserError, match=rf"config\.yaml: (is|has) {what}"):
        find(run_dir)
    with pytest.raises(UserError, match=rf"config\.yaml: (is|has) {what}"):
        with_run(composition.compose(config_name="evaluate"), run_of(str(run_dir)))


@pytest.mark.parametrize("name", ["adapter", "hf", "adapter/tokenizer.json", "checkpoints"])
def test_an_export_or_checkpoints_that_lead_elsewhere_are_not_read(name, run_dir, outside):
    plant(run_dir, name, outside)
    (run_dir / "config.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match=f"{name}: is a link"), open_export(str(run_dir)):
        pass
    if name.startswith("adapter"):
        with pytest.raises(UserError, match="is a link"):
            find_adapter(run_dir)
    if name != "checkpoints":
        with pytest.raises(UserError, match="is a link"):
            export_of(run_dir)
    else:
        with pytest.raises(UserError, match="is a link"):
            find(run_dir)


def test_an_export_replaces_a_link_and_goes_on_to_do_so(tmp_path, outside):
    (tmp_path / "adapter").symlink_to(outside)
    (tmp_path / ".adapter.partial").symlink_to(outside)
    (tmp_path / ".adapter.old").symlink_to(outside)
    for content in ("first", "second"):
        with publishing(tmp_path / "adapter", overwrite=True) as scratch:
            (scratch / "file").write_text(content)
    assert (tmp_path / "adapter" / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "home"]


@pytest.mark.parametrize("name", ["report.html", "best"])
def test_a_report_is_not_written_through_what_is_in_its_place(name, tmp_path, run_dir, outside, capsys):
    sweep = tmp_path / "sweep"
    (sweep / "a" / "adapter").mkdir(parents=True)
    write_run(sweep / "a")
    if name == "best":
        (sweep / name).mkdir()
    else:
        (sweep / name).symlink_to(outside / "file")
    if name == "best":
        write_report(sweep)  # without the link
        assert "best: is no link" in capsys.readouterr().err and not (sweep / "best").is_symlink()
        return
    with pytest.raises(UserError, match=f"{name}: is "):
        write_report(sweep)


def test_a_sweep_writes_through_no_links(tmp_path, outside):
    """The launcher looks before Hydra's sweeper writes multirun.yaml."""
    for name in ("multirun.yaml", "lr=1"):
        sweep = tmp_path / f"sweep of {name}"
        sweep.mkdir()
        (sweep / name).symlink_to(outside / ("file" if name.endswith("yaml") else ""))
        command = [sys.executable, "-m", "posttrain", "--multirun", f"hydra.sweep.dir='{sweep}'", "optimizer.lr=1,2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and f"{name}: is a link" in done.stderr, done.stderr


def test_a_trials_console_and_a_jobs_record(run_dir, outside):
    plant(run_dir, "logs/console.log", outside)
    with pytest.raises(UserError, match=r"console\.log: is a link"):
        job.redirect(run_dir, 0)
    plant(run_dir, "status.json", outside)
    with pytest.raises(UserError, match=r"status\.json: is a link"):
        Trial("run", run_dir, composition.compose(), error="x").record_failure()


def test_what_a_killed_process_was_writing_is_swept(run_dir):
    """And nothing else; where other machines write too, what is young is left to them."""
    (run_dir / "logs").mkdir()
    own = [".samples.json.0123abcd", ".config.yaml.k3_9z01a", "logs/.rank0.error.json.01234567"]
    others = [
        "logs/.console.log.0123abcd",
        ".notes.txt.0123abcd",
        ".samples.json.swp",
        ".samples.json.0123ABCD",
        "samples.json",
    ]
    for name in [*own, *others]:
        (run_dir / name).write_text(json.dumps(name))
    (run_dir / ".summary.json.01234567").mkdir()
    rundir.sweep(run_dir, lone=False)
    assert all((run_dir / name).exists() for name in own)
    rundir.sweep(run_dir, lone=True)
    assert not any((run_dir / name).exists() for name in own)
    assert all((run_dir / name).exists() for name in [*others, ".summary.json.01234567"])
