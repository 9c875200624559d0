"""A run is started again by its directory: with the same configuration, and with changes on top."""

import json
import pickle
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from posttrain.cli import command, rerun
from posttrain.report.trials import read_trial


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a command line; returns the composed configuration, or what was printed at exit code 2."""

    def start(*arguments):
        composed = []
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, arguments)])
        try:
            command.run(composed.append)
        except SystemExit as ended:
            assert ended.code == 2
            return capsys.readouterr().err
        return OmegaConf.to_container(composed[0])

    return start


@pytest.fixture
def run(start, tmp_path):
    """The directory of a run, as Hydra leaves it, and its configuration."""
    directory = tmp_path / "first = one"
    words = ["model=smollm2_135m", "peft=dora", "peft.rank=3", "optimizer.lr=1e-3", "data=messages"]
    words.append("data.path='a, b.jsonl'")
    return directory, start(*words, f"hydra.run.dir='{directory}'")


def test_the_same_command(start, run, tmp_path, capsys):
    directory, config = run
    again = start("--rerun", directory, f"hydra.run.dir={tmp_path}/again")
    assert again == config and again["data"]["path"] == "a, b.jsonl"
    printed = capsys.readouterr().err
    assert (
        printed.startswith(f"posttrain: {directory} again: model=smollm2_135m peft=dora") and printed.count("\n") == 1
    )
    saved = yaml.safe_load((directory / ".hydra" / "overrides.yaml").read_text())
    assert saved == yaml.safe_load((tmp_path / "again" / ".hydra" / "overrides.yaml").read_text())


def test_changes_on_top(start, run, tmp_path):
    directory, config = run
    again = start("peft=lora", f"--rerun={directory}", "optimizer.lr=2e-3", f"hydra.run.dir={tmp_path}/again")
    assert again["peft"]["_target_"].endswith("LoRA") and again["peft"]["rank"] == 3
    assert again["optimizer"]["lr"] == 2e-3 and again["data"] == config["data"]
    third = start("--rerun", tmp_path / "again", f"hydra.run.dir={tmp_path}/third")
    assert third == again


def test_a_run_continues_in_its_own_directory(start, run, tmp_path, capsys):
    directory, config = run
    assert start("--resume", directory, "trainer.max_steps=9") == {
        **config,
        "trainer": {**config["trainer"], "max_steps": 9},
    }
    printed = capsys.readouterr().err
    assert printed.startswith(f"posttrain: {directory} continues from step 0, since it has no checkpoint: model=")
    assert "trainer.max_steps=9\n" in printed and "hydra." not in printed
    hydra = OmegaConf.load(directory / ".hydra" / "hydra.yaml").hydra
    assert hydra.runtime.output_dir == str(directory)
    assert not (tmp_path / "outputs").exists()
    assert "leave hydra.run.dir out" in start("--resume", directory, "hydra.run.dir=x")
    assert "leave --multirun out" in start("--resume", directory, "--multirun", "seed=1,2")


def test_a_run_without_a_whole_checkpoint_is_not_said_to_have_none(run, capsys):
    directory, _ = run
    (directory / "checkpoints" / "iter_0000004").mkdir(parents=True)
    rerun.expand(["--resume", str(directory)])
    assert "continues from no step, since none of its checkpoints is whole: model=" in capsys.readouterr().err


def test_resuming_leaves_out_what_would_refuse_it(start, run):
    directory, _ = run
    (directory / ".hydra" / "overrides.yaml").write_text("- run.resume=never\n- peft.rank=3\n")
    again = start("--resume", directory)
    assert again["run"]["resume"] == "auto" and again["peft"]["rank"] == 3


@pytest.mark.parametrize("option", ["--resume", "--rerun"])
def test_a_template_that_an_older_run_was_given_without_effect_is_left_out(start, tmp_path, capsys, option):
    directory, place = tmp_path / "first", [f"hydra.run.dir={tmp_path}/again"]
    if option == "--resume":
        place = []
    words = ["objective=text", "data.path=a.txt", "template=chatml"]
    config = start(*words, f"hydra.run.dir={directory}")
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    again = start(option, directory, *place)
    assert again["template"]["name"] == "model" and again["objective"] == config["objective"]
    assert "template=chatml: has no effect with this objective and had none; it is left out" in capsys.readouterr().err
    for more in (["objective=sft", "data=messages"], ["template=chatml"]):  # what is typed now is this command's own
        (directory / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words), encoding="utf-8")
        assert start(option, directory, *place, *more)["template"]["name"] == "chatml"
        assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("ask", [["--cfg", "job"], ["-c", "hydra"], ["--info", "defaults"]])
def test_what_a_run_would_be_is_not_said_as_if_it_were(run, ask, capsys):
    directory, _ = run
    (directory / "status.json").write_text('{"state": "stopped"}')
    rerun.expand(["--resume", str(directory), *ask])
    printed = capsys.readouterr().err
    assert printed.startswith(f"posttrain: {directory} would continue from step 0, since it has no checkpoint: model=")
    assert ask[0] not in printed and "hydra." not in printed
    rerun.expand(["--rerun", str(directory), *ask])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and ask[0] not in printed and "this starts at step 0" not in printed
    rerun.expand(["--resume", str(directory)], trains=False)  # `plan --resume RUN`
    assert "would continue" in capsys.readouterr().err


def test_starting_over_names_the_way_to_continue(start, run, tmp_path, capsys, monkeypatch):
    directory, _ = run
    monkeypatch.chdir(tmp_path)
    start("--rerun", directory, f"hydra.run.dir={tmp_path}/again")
    assert "not finished" not in capsys.readouterr().err  # it says nothing of how it ended
    for state, said in (("running", True), ("stopped", True), ("finished", False)):
        (directory / "status.json").write_text(json.dumps({"state": state}))
        start("--rerun", directory)
        err = capsys.readouterr().err
        assert ("has not finished; this starts at step 0. To continue from step 0" in err) == said
        assert (f"python -m posttrain --resume '{directory}'" in err) == said


def test_a_file_of_overrides_comes_on_top(start, run, tmp_path):
    directory, _ = run
    (tmp_path / "more.yaml").write_text("peft:\n  rank: 5\noptimizer.lr: 5e-3\n")
    place = f"hydra.run.dir={tmp_path}/again"
    again = start("--rerun", directory, tmp_path / "more.yaml", "optimizer.lr=6e-3", place)
    assert again["peft"]["rank"] == 5 and again["optimizer"]["lr"] == 6e-3
    assert again["model"]["path"] == "demo:smollm2_135m"


@pytest.mark.parametrize("option", ["--rerun", "--resume"])
def test_the_name_of_the_run_file_is_kept(start, tmp_path, option, capsys):
    file, first, again = tmp_path / "my run.yaml", tmp_path / "first", tmp_path / "again"
    file.write_text("peft: {rank: 3}\n")
    start(file, f"hydra.run.dir={first}")
    assert read_trial(first, tmp_path).file == str(file)
    (first / ".hydra" / "config.yaml").unlink()  # Hydra writes it again
    place = [] if option == "--resume" else [f"hydra.run.dir={again}"]
    capsys.readouterr()
    assert start(option, first, *place)["peft"]["rank"] == 3
    assert "hydra.job.name" not in capsys.readouterr().err
    where = first if option == "--resume" else again
    assert (where / ".hydra" / "config.yaml").is_file() and read_trial(where, tmp_path).file == str(file)
    start("--rerun", first, "hydra.job.name=mine", f"hydra.run.dir={tmp_path}/third")
    assert OmegaConf.load(tmp_path / "third" / ".hydra" / "hydra.yaml").hydra.job.name == "mine"


@pytest.mark.parametrize("name", ["'${oc.env:HOME}.yaml'", '"a\\nb.yaml"', "[x.yaml]", "posttrain"])
def test_a_name_that_is_no_file_s_is_not_taken(start, run, tmp_path, name):
    directory, _ = run
    settings = directory / ".hydra" / "hydra.yaml"
    text = settings.read_text(encoding="utf-8")
    assert text.count("    name: posttrain\n") == 1
    settings.write_text(text.replace("    name: posttrain\n", f"    name: {name}\n"), encoding="utf-8")
    assert start("--rerun", directory, f"hydra.run.dir={tmp_path}/again")["peft"]["rank"] == 3
    assert OmegaConf.load(tmp_path / "again" / ".hydra" / "hydra.yaml").hydra.job.name == "posttrain"


def test_a_run_that_was_moved(start, run, tmp_path):
    directory, config = run
    moved = tmp_path / "elsewhere" / "b"
    moved.parent.mkdir()
    directory.rename(moved)
    assert start("--rerun", moved, f"hydra.run.dir={tmp_path}/again") == config


def test_a_run_of_files_of_ones_own(start, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text("# @package _global_\npeft:\n  rank: 3\n")
    own = ("--config-dir", tmp_path / "mine")
    first = start(*own, "experiment=x", f"hydra.run.dir={tmp_path}/first")
    assert first["peft"]["rank"] == 3
    assert f"was started with --config-dir {tmp_path}/mine; give it again" in start("--rerun", tmp_path / "first")
    assert start(*own, "--rerun", tmp_path / "first", f"hydra.run.dir={tmp_path}/again") == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- trainer.samples=3\n", r"`trainer.samples`: unknown key"),
        ("- peft=nothing\n", r"`peft=nothing`: there is no such choice"),
        ("a: b\n", "overrides.yaml: damaged: expected a list of overrides, each a text"),
        ("- 3\n", "overrides.yaml: damaged: expected a list of overrides"),
        ("- [\n", "overrides.yaml: not valid YAML"),
        ("- a=[b\n", "overrides.yaml: a=[b: can't be read as KEY=VALUE"),
        ("- --multirun\n", "overrides.yaml: --multirun: can't be read as KEY=VALUE"),
        (b"- a=\xff\n", "overrides.yaml: damaged: is not UTF-8"),
        ("- seed=1,2\n", "overrides.yaml: seed=1,2: is a sweep"),
        ("- cache_dir=/x\n", "overrides.yaml: cache_dir=/x: is written to, outside of the run directory"),
        ("- '+launch={master_addr: evil}'\n", "says which machines a run trusts"),
        ("- hydra/launcher=slurm\n", "is Hydra's own"),
        ("- model@hydra.job=gpt2\n", "is Hydra's own"),
    ],
)
def test_overrides_that_are_damaged_or_of_another_version(start, run, text, message):
    directory, _ = run
    content = text if isinstance(text, bytes) else text.encode()
    (directory / ".hydra" / "overrides.yaml").write_bytes(content)
    said = start("--rerun", directory)
    assert message in said and "Traceback" not in said
    lines = [line for line in said.splitlines() if " again: " not in line]
    assert len(lines) == 1


def test_what_is_the_command_lines_is_given_again(start, run, tmp_path):
    directory, _ = run
    (directory / ".hydra" / "overrides.yaml").write_text("- cache_dir=/x\n- peft.rank=3\n")
    again = start("--rerun", directory, f"cache_dir={tmp_path}", f"hydra.run.dir={tmp_path}/again")
    assert again["cache_dir"] == str(tmp_path) and again["peft"]["rank"] == 3


@pytest.mark.parametrize("settings", ["hydra: [3]\n", "3\n", "hydra:\n  job: x\n"])
def test_damaged_settings(start, run, settings):
    directory, _ = run
    (directory / ".hydra" / "hydra.yaml").write_text(settings)
    assert "hydra.yaml: damaged: it says which files the run was made of" in start("--rerun", directory)
    (directory / ".hydra" / "hydra.yaml").unlink()
    assert start("--rerun", directory, f"hydra.run.dir={directory.parent}/again")["peft"]["rank"] == 3


def test_no_run(start, tmp_path):
    assert f"--rerun {tmp_path}/none: no such directory" in start("--rerun", tmp_path / "none")
    assert "give the directory of a run, of a sweep that of one trial" in start("--rerun", tmp_path)
    assert "--rerun: give the directory of a run" in start("--rerun")
    assert "--rerun: one run at a time" in start("--rerun", tmp_path, f"--rerun={tmp_path}")


def test_options_that_are_given_a_run_name_the_way(start, run, tmp_path):
    directory, _ = run
    advice = f"to start that run again: python -m posttrain --rerun '{directory}'\n"
    assert start("--config-path", directory).endswith(advice)
    assert start(f"--config-path={directory / '.hydra'}").endswith(advice)
    for folder in (directory, directory / ".hydra"):
        assert start("--config-dir", folder).endswith(advice)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps({}))
    assert "a run again: python -m posttrain --rerun RUN" in start("--experimental-rerun", tmp_path / "config.pickle")
