"""Which targets a configuration may name, wherever it names them."""

import sys

import pytest
from omegaconf import OmegaConf

from posttrain.config import targets
from posttrain.config.composition import compose
from posttrain.errors import UserError

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

    assert targets.is_own(f"mine.{name}")
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
