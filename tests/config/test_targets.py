"""Which targets a configuration may name, wherever it names them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from posttrain.config import targets
from posttrain.config.composition import compose
from posttrain.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EVIL = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "importlib.import_module",
    "hydra.utils.get_method",
    "posttrain.launch.subprocess.Popen",
    "posttrain.launch.os.system",
    "posttrain.data.formats.json.load",
    "posttrain.config.targets.os.system",
    "posttrain.models.hf.os.system",
    "posttrain.launch.worker.main",
    "megatron.bridge.training.config.os.system",
    "megatron.bridge.training.config.ConfigContainer.from_yaml",
    "megatron.core.utils.torch.load",
    "transformers.pipeline",
    "posttrain.peft.LoRA.build",
    " posttrain.peft.LoRA",
    "posttrain.peft.LoRA\nos.system",
]


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize(
    "place",
    [
        lambda t: {"peft": {"_target_": t}},
        lambda t: {"data": {"format": {"nested": {"_target_": t}}}},
        lambda t: {"logger": {"x": [{"a": 1}, {"_target_": t}]}},
        lambda t: {"trainer": {"megatron": {"model": {"deep": [[{"_target_": t}]]}}}},
    ],
)
def test_refused_wherever_it_stands(target, place):
    with pytest.raises(UserError, match="POSTTRAIN_ALLOW_TARGETS"):
        targets.check(OmegaConf.create(place(target)))


SHIPPED = {
    "model": "posttrain.models.HFModel",
    "peft": "posttrain.peft.LoRA",
    "data": "posttrain.data.TrainingData",
    "data.format": "posttrain.data.formats.Messages",
    "template": "posttrain.data.templates.ChatTemplate",
    "parallelism": "posttrain.train.parallelism.Parallelism",
    "optimizer": "megatron.bridge.training.config.OptimizerConfig",
    "scheduler": "megatron.bridge.training.config.SchedulerConfig",
    "trainer": "posttrain.train.trainer.Trainer",
    "precision": "posttrain.train.precision.Precision",
    "checkpoint": "posttrain.checkpoint.Checkpoint",
    "logger.x": "posttrain.train.trackers.Wandb",
    "metric": "posttrain.evaluate.ExactMatch",
    "trainer.megatron.comm_overlap.x": "megatron.bridge.training.comm_overlap.CommOverlapConfig",
}


@pytest.mark.parametrize("place", SHIPPED)
def test_each_group_builds_its_own_classes_alone(place, monkeypatch):
    def composed(target):
        cfg = OmegaConf.create()
        OmegaConf.update(cfg, place, {"_target_": target}, force_add=True)
        return cfg

    for target in [*SHIPPED.values(), "posttrain.data.Splits"]:
        if target == SHIPPED[place] or (place.startswith("trainer.megatron") and target.startswith("megatron")):
            targets.check(composed(target))
            continue
        with pytest.raises(UserError, match=f"{place}._target_={target}: not a target that a configuration may name"):
            targets.check(composed(target))
    monkeypatch.setenv(targets.ENVIRONMENT, "mine")
    targets.check(composed("mine.Own"))


def test_interpolated_target_is_seen():
    cfg = OmegaConf.create({"name": "os.system", "peft": {"_target_": "${name}"}})
    with pytest.raises(UserError, match=r"os\.system"):
        targets.check(cfg)


def test_target_that_is_not_text_is_refused():
    with pytest.raises(UserError):
        targets.check(OmegaConf.create({"peft": {"_target_": ["os", "system"]}}))


def test_config_dir_does_not_help(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "evil.yaml").write_text("# @package _global_\npeft:\n  _target_: os.system\n")
    cfg = compose(["peft=evil", f"hydra.searchpath=[file://{tmp_path}]"])
    with pytest.raises(UserError, match=r"peft\._target_=os\.system"):
        targets.check(cfg)


def test_own_code_is_allowed_by_the_environment_only(monkeypatch):
    cfg = OmegaConf.create({"data": {"_target_": "mine.Data"}})
    with pytest.raises(UserError):
        targets.check(cfg)
    monkeypatch.setenv(targets.ENVIRONMENT, "mine, other.place")
    targets.check(cfg)
    with pytest.raises(UserError):
        targets.check(OmegaConf.create({"data": {"_target_": "minerva.Data"}}))


def test_everything_the_project_ships_is_allowed():
    assert [target for _, target in targets.walk(compose(["logger=[wandb,tensorboard]"]))]
    targets.check(compose(["logger=[wandb,tensorboard]"]))


OWN = """
import functools, os, torch
from torch import load as loaded
import posttrain.errors as others
def score(): return 1
class Scorer:
    def of(self): return 2
    @classmethod
    def made(cls): return cls()
class Table(dict): pass
later = functools.partial(os.system, "touch /x")
held = Scorer()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, allowed by its name."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(OWN)
    (tmp_path / "mine" / "below.py").write_text("class Deep: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(targets.ENVIRONMENT, "mine")
    for name in ("mine", "mine.below"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", ["score", "Scorer", "Scorer.made", "below.Deep"])
def test_what_an_allowed_module_defines(name, own):
    from posttrain.checkpoint import pickles

    assert targets.is_own(f"mine.{name}", "data")
    module, _, last = f"mine.{name}".rpartition(".") if name == "below.Deep" else ("mine", ".", name)
    assert pickles.allowed(module, last)


@pytest.mark.parametrize(
    "name",
    ["torch.load", "loaded", "os.system", "os.environ.clear", "others.UserError", "later", "Table.fromkeys",
     "score.__globals__.clear", "functools.partial"],
)  # fmt: skip
def test_what_an_allowed_module_only_imports(name, own):
    from posttrain.checkpoint import pickles
    from posttrain.config.instantiate import built

    with pytest.raises(UserError, match="is not defined in a module that"):
        built(OmegaConf.create({"_target_": f"mine.{name}"}))
    with pytest.raises(UserError, match="is not defined in a module that"):
        built(OmegaConf.create({"_target_": "mine.Scorer", "x": [{"_target_": f"mine.{name}"}]}))
    assert not pickles.allowed("mine", name)
    assert not pickles.allowed(*f"mine.{name}".rsplit(".", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nothere\n", "line 1: ModuleNotFoundError: No module named 'nothere'"),
        ("import os\n\nos.nothing\n", "line 3: AttributeError: module 'os' has no attribute 'nothing'"),
        ("def score():\nreturn 1\n", "line 2: IndentationError: expected an indented block"),
        ("from below import missing\n", "line 1: ImportError: cannot import name 'missing' from 'below'"),
        ("class Other: pass\n", "there is no such thing"),
    ],
)
def test_a_users_module_that_fails_is_named_with_its_line(content, message, tmp_path, monkeypatch):
    from posttrain.config.instantiate import built

    (tmp_path / "broken.py").write_text(content)
    (tmp_path / "below.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(targets.ENVIRONMENT, "broken")
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UserError) as refused:
        built(OmegaConf.create({"data": {"_target_": "broken.Mine"}}).data)
    place = f"{tmp_path}/broken.py, " if message.startswith("line") else ""
    assert str(refused.value).startswith(f"`data._target_=broken.Mine`: {place}{message}")


def test_a_users_module_that_fails_exits_with_2(tmp_path):
    (tmp_path / "broken.py").write_text("import nothere\n")
    words = ["data=alpaca", f"data.path={__file__}", "data.format._target_=broken.Mine"]
    environment = {**os.environ, targets.ENVIRONMENT: "broken", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-m", "posttrain", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    key = "data.format._target_=broken.Mine"
    error = f"{tmp_path}/broken.py, line 1: ModuleNotFoundError: No module named 'nothere'"
    assert (done.returncode, done.stderr) == (2, f"posttrain: `{key}`: {error}\n")
