"""Interpolations are resolved once: what a run's files hold is text, and never a secret of the environment."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from posttrain.checkpoint import resume
from posttrain.config import frozen, secrets
from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.evaluate.settings import with_run
from posttrain.launch import launcher
from posttrain.primus.__main__ import import_config
from posttrain.report.comparison import compare
from posttrain.report.sweep_page import render_sweep
from posttrain.report.trials import read_trial
from posttrain.spec import checks
from posttrain.sweep import slurm
from posttrain.sweep.trial import Trial

SECRET = "the-token-of-whom-it-is"
NAME = r"run.name='x\${oc.env:HF_TOKEN}'"
LITERAL = "x${oc.env:HF_TOKEN}"


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)


@given(st.text(alphabet="\\${}a:'\" \n", max_size=12))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_every_text_is_read_back_as_it_was(text):
    values = {"a": [text, {"b": text}]}
    written = frozen.text(frozen.literal(values))
    loaded = OmegaConf.create(written)
    assert OmegaConf.to_container(loaded, resolve=True) == values
    assert frozen.unescaped(OmegaConf.to_container(loaded, resolve=False)) == values


def test_a_run_freezes_what_it_was_told(tmp_path):
    cfg = compose([NAME])
    checks.check(cfg, 0)
    path = launcher.prepare(cfg, tmp_path)
    assert SECRET not in path.read_text()
    read = frozen.read(tmp_path)
    assert read.run.name == LITERAL == OmegaConf.load(path).run.name
    assert frozen.text(read) == path.read_text()  # as each checkpoint keeps it
    assert not resume.differences(read, compose([NAME]))
    (tmp_path / "status.json").write_text("{}")
    assert read_trial(tmp_path, tmp_path).config["run.name"] == LITERAL


def test_a_trial_and_a_job_freeze_the_same(tmp_path):
    trial = Trial("t", tmp_path, compose([NAME], with_hydra=True))
    task = slurm._task(trial)
    assert task.run.name == LITERAL
    launcher.prepare(task, tmp_path)
    (tmp_path / "status.json").write_text('{"state": "running"}')
    assert not trial.already_finished()  # and not: made with other settings
    (tmp_path / "config.yaml").unlink()
    trial.error = "failed"
    trial.record_failure()
    assert frozen.read(tmp_path).run.name == LITERAL


def test_what_is_built_holds_no_interpolation_as_text():
    cfg = compose([r'template.bos="\${oc.env:HF_TOKEN}"'])
    with pytest.raises(UserError, match=r"template\.bos"):
        checks.check(cfg, 0)


def test_a_strangers_frozen_configuration_is_not_resolved(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {path: '${oc.env:HF_TOKEN}'}\n")
    for read in (frozen.read, lambda run_dir: with_run(compose([], "evaluate"), run_dir)):
        with pytest.raises(UserError, match="holds an interpolation"):
            read(tmp_path)


def test_a_process_that_only_reads_a_frozen_configuration_has_the_guard(tmp_path):
    """A worker or a Slurm job composes nothing, so nothing else puts it there."""
    (tmp_path / "config.yaml").write_text("a: 1\n")
    program = (
        "import pathlib, sys; from posttrain.config import frozen; from omegaconf import OmegaConf\n"
        "frozen.read(pathlib.Path(sys.argv[1]).parent)\n"
        "print(OmegaConf.create({'x': '${oc.env:HF_TOKEN}'}).x)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.yaml")], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode and SECRET not in done.stdout + done.stderr.replace("oc.env:HF_TOKEN", "")


def test_resolvers_that_a_file_may_use():

    names = set(BaseContainer._resolvers)
    assert names <= {
        "oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env", "oc.select",
        "hydra", "now", "python_version", "times", "if_null", "sweep_name",
    }  # fmt: skip


def test_the_value_of_a_variable_counts_as_well_as_its_name(monkeypatch):
    monkeypatch.setenv("MINE", "hf_" + "a" * 34)
    for variable in ("MINE", "HF_TOKEN", "WANDB_API_KEY"):
        with pytest.raises(UserError) as error:
            secrets.env(variable)
        assert "hf_a" not in str(error.value)
    monkeypatch.setenv("TOKENIZED_DATA", "/data")
    assert secrets.env("TOKENIZED_DATA") == "/data"


PRIMUS = "framework: megatron_bridge\nmodel: {hf_path: Qwen/Qwen3-0.6B}\n"


@pytest.mark.parametrize(
    "line",
    ["foo: ${HF_TOKEN}", "foo: 'a ${HF_TOKEN:} b'", "hf_path: ${HF_TOKEN:x}", "foo: hf_" + "a" * 34],
    ids=["name", "default", "known key", "value"],
)
def test_primus(line, tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text(PRIMUS + line + "\n")
    with pytest.raises(UserError) as error:
        import_config([str(tmp_path / "theirs.yaml"), f"out={tmp_path / 'out.yaml'}"])
    assert (
        "theirs.yaml" in str(error.value)
        and SECRET not in str(error.value)
        and "hf_" + "a" * 34 not in str(error.value)
    )
    assert not (tmp_path / "out.yaml").exists()


def test_a_page_spells_out_control_characters(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "status.json").write_text('{"state": "failed", "error": "a\\u001b[31m"}')
    page = render_sweep(compare([read_trial(tmp_path, tmp_path)]), "title\x1b[2J", "report.csv")
    head = page.partition('<script type="application/json"')[0]
    assert "\x1b" not in page and r"title\x1b[2J" in head and r"a\x1b[31m" in head
