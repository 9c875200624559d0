"""Values of another kind than a key takes: a UserError, whichever key and whatever value."""

import copy
import json
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config import schema
from posttrain.config.composition import compose, key_paths
from posttrain.data import TrainingData
from posttrain.errors import UserError
from posttrain.evaluate.settings import EvaluateConfig
from posttrain.plan.__main__ import PlanConfig
from posttrain.preview import PreviewConfig
from posttrain.spec import checks

NUMBERS = [1, -1, 0, 10**30, 1.5, float("nan"), float("inf"), True]
VALUES = ["text", "", "\0", "???", *NUMBERS, None, [], [1], ["a"], {}, {"a": 1}, {"a": None}]


def attempt(cfg, key, value):
    """Put `value` there without the schema's own check of a command line, and check the configuration."""
    changed = copy.deepcopy(cfg)
    try:
        OmegaConf.update(changed, key, value, merge=False, force_add=True)
        checks.check(changed, 0)
    except (UserError, OmegaConfBaseException) as error:  # the command says both in words: compose.explain
        return str(error)
    return ""


@pytest.fixture(scope="module")
def plain():
    return compose(["logger=tensorboard"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.architecture", "text"),
        ("model.architecture", [1]),
        ("model.architecture.num_hidden_layers", "text"),
        ("model.architecture.num_attention_heads", [1]),
        ("model.architecture.num_key_value_heads", {"a": 1}),
        ("data", "text"),
        ("data", {}),
        ("data", {"path": "x"}),
        ("data._partial_", True),
        ("data._partial_", "text"),
        ("objective", "text"),
        ("objective", {}),
        ("objective._partial_", True),
        ("objective._partial_", [1]),
        ("data.path", 1),
        ("data.path", [1]),
        ("data.validation_path", True),
        ("data.packing", "text"),
        ("data.max_length", "text"),
        ("data.seed", "text"),
        ("data.validation_fraction", "text"),
        ("data.sources", {"a": 1}),
        ("data.format", {"a": 1}),
        ("data.format", None),
        ("data.format._partial_", True),
        ("template", 1),
        ("template._partial_", True),
        ("template.file", 1),
        ("template.file", "\0"),
        ("template.special_tokens", "text"),
        ("template.variables", [1]),
        ("trainer", "???"),
        ("trainer.micro_batch_size", None),
        ("logger.m", None),
        ("logger.m", "text"),
        ("logger.m", {}),
        ("logger.tensorboard", None),
        ("logger.tensorboard", [{"_target_": "posttrain.train.trackers.TensorBoard"}]),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(plain, key, value):
    said = attempt(plain, key, value)
    assert key.removesuffix("._partial_").rpartition(".")[2] in said or "PATH" in said


def test_sources_of_other_kinds(plain):
    messages = {"_target_": "posttrain.data.formats.Messages"}
    for source in ("text", {}, {"path": 1}, {"path": [1]}, {"path": "a", "format": {"a": 1}},
                   {"path": "a", "weight": float("inf")}, {"path": "a", "weight": 1e30},
                   {"path": "README.md", "format": {**messages, "roles": "text"}}):  # fmt: skip
        changed = copy.deepcopy(plain)
        changed.data.path = None
        assert "data" in attempt(changed, "data.sources", [source]), source


@pytest.mark.nightly
def test_every_key_with_every_kind_of_value(plain):
    for key in key_paths(plain):
        for value in VALUES:
            attempt(plain, key, value)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "num_local_experts"])
def test_a_size_in_the_file_of_a_model(plain, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", name: "text"}))
    changed = copy.deepcopy(plain)
    changed.model.path = str(tmp_path)
    assert f"config.json: {name}=text" in attempt(changed, "run.name", "x")


def is_whole(hint):
    return hint is int or int in get_args(hint)


def whole_numbers(config):
    """Key paths of the whole numbers of a configuration, two levels of it."""
    for group in fields(config):
        kind = TrainingData if group.name == "data" else group.type
        if is_whole(group.type):
            yield group.name
        if hasattr(kind, "__dataclass_fields__"):
            yield from (f"{group.name}.{name}" for name, hint in get_type_hints(kind).items() if is_whole(hint))


@pytest.mark.parametrize("config", [schema.Config, EvaluateConfig, PlanConfig, PreviewConfig])
def test_each_whole_number_has_an_upper_and_a_lower_limit(config):
    limits = schema.limits(config)
    names = list(whole_numbers(config))
    assert len(names) > 30
    for name in names:
        assert {"le", "lt"} & limits[name].keys() and "ge" in limits[name], name
    options = {field.name: field.metadata for field in fields(schema.SlurmSchema) if is_whole(field.type)}
    assert len(options) == 6 and all({"ge", "le"} <= metadata.keys() for metadata in options.values())


def test_what_is_beyond_an_upper_limit(plain):
    for name, limit in schema.limits().items():
        if "le" not in limit:
            continue
        most = limit["le"]
        changed = copy.deepcopy(plain)
        OmegaConf.update(changed, name, most, merge=False)
        checks.check_ranges(changed)
        OmegaConf.update(changed, name, most + 1 if isinstance(most, int) else most * 2, merge=False)
        with pytest.raises(UserError, match=f"`{name}=.*at most"):
            checks.check_ranges(changed)


@pytest.mark.parametrize("word", [
    "hydra.sweeper.n_trials=1000000000",
    "hydra.sweeper.n_trials=0", "hydra.sweeper.n_jobs=100000", "sweep.parallel=100000",
    "hydra.sweeper.sampler.n_ei_candidates=1000000000", "hydra.sweeper.sampler.n_startup_trials=1000000000",
    "hydra.sweeper.sampler.seed=-1",
])  # fmt: skip
def test_numbers_of_a_search(word):
    with pytest.raises(UserError, match=r"sweep.*must be at (most|least)"):
        checks.check_ranges(compose(["hydra/sweeper=optuna", word], with_hydra=True))


@pytest.mark.parametrize("word", ["nodes=0", "nodes=100000", "gpus_per_node=-1", "max_requeues=1000000000", "poll_s=0",
                                  "array_parallelism=0", "signal_delay_s=-1", "mem_gb=-1"])  # fmt: skip
def test_numbers_of_a_job(word):
    with pytest.raises(UserError, match=r"hydra\.launcher\..*must be"):
        compose(["hydra/launcher=slurm", f"hydra.launcher.{word}"], with_hydra=True)
