"""A YAML file on the command line stands for the overrides in it."""

import sys

import pytest
from omegaconf import OmegaConf

from posttrain.cli import command, run_file
from posttrain.report.facts import facts_of_run
from posttrain.report.trials import read_trial


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """Runs a command line; returns the composed configuration, or what was printed at exit code 2."""

    def start(*arguments):
        composed = []
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, arguments), f"hydra.run.dir={tmp_path}/run"])
        try:
            command.run(composed.append)
        except SystemExit as ended:
            assert ended.code == 2
            return capsys.readouterr().err
        return OmegaConf.to_container(composed[0])

    return start


@pytest.fixture
def write(tmp_path):
    def write(text, name="my run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


RUN = """
# A comment.
model: smollm2_135m
peft: dora
logger: [wandb, tensorboard]
data: alpaca
data.path: "a, b.jsonl"
optimizer:
  lr: 1e-4
trainer:
  epochs: 2
  megatron: {model: {init_method_std: 0.5}}
run: {name: null}
"""


def test_overrides_in_a_file(start, write):
    cfg = start(write(RUN))
    assert cfg["peft"]["_target_"].endswith("DoRA") and set(cfg["logger"]) == {"wandb", "tensorboard"}
    assert (cfg["data"]["path"], cfg["optimizer"]["lr"], cfg["trainer"]["epochs"]) == ("a, b.jsonl", 1e-4, 2.0)
    assert cfg["trainer"]["megatron"] == {"model": {"init_method_std": 0.5}} and cfg["run"]["name"] is None


@pytest.mark.parametrize("named", [True, False])
def test_a_run_knows_the_name_of_its_file(start, write, tmp_path, named):
    path = write(RUN)
    start(path if named else "peft=dora", "seed=3")
    facts = {fact.name: fact.value for fact in facts_of_run(read_trial(tmp_path / "run", tmp_path))}
    assert facts.get("run file") == (str(path) if named else None)


def test_the_command_line_comes_on_top(start, write):
    cfg = start("peft=lora", write(RUN), "optimizer.lr=3e-4", "data.path=mine.jsonl")
    assert cfg["peft"]["_target_"].endswith("LoRA") and cfg["trainer"]["epochs"] == 2.0
    assert (cfg["data"]["path"], cfg["optimizer"]["lr"]) == ("mine.jsonl", 3e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer: {save_steps: 3}",
            "FILE: `trainer.save_steps`: unknown key; here it is `checkpoint.save_interval=500`",
        ),
        ("peft:\n  rnak: 3", "FILE: `peft.rnak`: unknown key; did you mean `peft.rank`?"),
        ("peft.rank: many", "FILE: `peft.rank=many`: Value 'many' of type 'str'"),
        ("model: llama9_8b", "FILE: `model=llama9_8b`: there is no such choice"),
        ("hydra: {job: {name: x}}", "FILE: `hydra.job.name`: is Hydra's own"),
        ("launch.master_addr: evil", "FILE: `launch.master_addr`: says which machines a run trusts"),
        ("defaults: [model: gpt2]", "FILE: `defaults`: is Hydra's list of files"),
        ("'a b': 3", "FILE: `a b`: is no name of a key"),
        ("- model", "FILE: not a configuration: its outermost level must be a mapping"),
        ("a: [b", "FILE"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(start, write, text, message):
    path = write(text)
    assert start(path).startswith(f"posttrain: {message.replace('FILE', str(path))}")


def test_a_file_that_is_not_there_and_two(start, write, tmp_path):
    assert start(tmp_path / "no.yaml") == f"posttrain: {tmp_path}/no.yaml: no such file\n"
    both = start(write(RUN), write(RUN, "other.yaml"))
    assert both == f"posttrain: {tmp_path}/my run.yaml and {tmp_path}/other.yaml: one file at a time\n"


def test_what_an_option_names_is_no_run():
    for words in (["--config-name", "x.yaml"], ["-cd", "x.yaml"], ["data.path=x.yaml"], ["--cfg", "job"]):
        assert run_file.expand(words) == words
