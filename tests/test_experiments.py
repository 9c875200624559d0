"""The ready runs of conf/experiment: each composes, passes every check, and fits the machine that it names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import experiments
from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.spec import checks
from posttrain.utils import gpus

PAGE = Path(__file__).resolve().parents[1] / "docs" / "experiments.md"
READY = experiments.ready_runs()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A file that is text as well as conversations."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    path.write_text("".join(json.dumps({"messages": turns, "text": f"{i} is a number"}) + "\n" for i in range(50)))
    return path


@pytest.mark.parametrize("experiment", READY, ids=lambda experiment: experiment.name)
def test_checks_and_memory(experiment, rows):
    cfg = compose([f"experiment={experiment.name}", f"data.path={rows}"])
    local = experiment.count // cfg.launch.nnodes
    shape = checks.check_settings(cfg, local, elsewhere=True)
    checks.check_parallelism(cfg, local, shape)
    if experiment.count:
        needed, speed = experiment.plan()
        assert needed < gpus.find_gpu(experiment.gpu).memory_gib and speed > 0


def test_the_page_lists_them():
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.M)
    assert listed == [(one.name, one.title, one.machine) for one in READY]


def test_commands():
    command = [sys.executable, "-m", "posttrain.experiments"]
    listed = subprocess.run(command, capture_output=True, text=True)
    assert listed.returncode == 0 and all(one.title in listed.stdout for one in READY)
    shown = subprocess.run([*command, "smoke"], capture_output=True, text=True)
    assert shown.stdout.startswith("# @package _global_\n# The shortest real run")


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="did you mean lora_qwen3_8b"):
        experiments.show("lora_qwen_8b")


def test_a_file_without_a_sentence_is_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 2\n")
    monkeypatch.setattr(experiments, "DIRECTORY", tmp_path)
    experiments.list_all()
    assert "mine                             any machine\n    (its file doesn't begin" in capsys.readouterr().out


def test_the_shipped_ones_say_what_they_are():
    assert all(one.title.endswith(".") for one in READY)
