"""`posttrain COMMAND ...` is `python -m posttrain.COMMAND ...`."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from posttrain.cli import subcommands

ROOT = Path(__file__).resolve().parents[2]
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["posttrain"]
SCRIPT = EntryPoint("posttrain", NAME, "console_scripts")
AS_SCRIPT = ["-c", f"import sys; sys.argv[0] = 'posttrain'; from {SCRIPT.module} import {SCRIPT.attr} as m; m()"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_a_command_is_its_module():
    expected = run("-m", "posttrain.recipes", "no_such_recipe")
    assert expected.returncode == 2 and "no_such_recipe" in expected.stderr
    for start in (AS_SCRIPT, ["-m", "posttrain"]):
        done = run(*start, "recipes", "no_such_recipe")
        assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_another_name_leads_to_a_command():
    commands = subcommands.files(subcommands.PACKAGE)
    modules = {"posttrain", *map(subcommands.module_of, commands)}
    assert set(map(subcommands.module_of, subcommands.ALIASES)) <= modules
    assert not set(subcommands.ALIASES) & set(commands)


def test_a_file_and_no_command(tmp_path):
    """What follows `train` is read as without it."""
    (tmp_path / "my.yaml").write_text("optimizer: {lr: 1e-6}\n")
    done = run(*AS_SCRIPT, "train", str(tmp_path / "my.yaml"), "--cfg", "job", "--package", "optimizer")
    assert done.returncode == 0 and "lr: 1.0e-06\n" in done.stdout, done.stderr


@pytest.mark.parametrize("word, meant", [("trian", "; did you mean `train`?"), ("serve", "report, train")])
def test_no_such_command(word, meant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["posttrain", word, "model=llama3_8b"])
    with pytest.raises(SystemExit) as left:
        subcommands.run_named()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(f"posttrain: {word}: no such command") and meant in said


@pytest.mark.parametrize("words", [[], ["model=llama3_8b"], ["--help"], ["my.yaml"], ["~logger"], ["train", "x=1"]])
def test_training_goes_on(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["posttrain", *words])
    subcommands.run_named()
    assert sys.argv == ["posttrain", *[word for word in words if word != "train"]]
