"""`python -m posttrain.options`: every key of conf/ with what its file says of it."""

import re
import subprocess
import sys

import pytest
import yaml

from posttrain import options
from posttrain.cli import conf_options
from posttrain.config.composition import CONF_DIR, compose, key_paths
from posttrain.errors import UserError


def lines(name):
    return list(options.describe(name))


def test_every_key_of_training_is_listed_and_explained():
    """The keys are those that are composed, and each has a comment, its own or that of what it is below."""
    listed = conf_options.keys(CONF_DIR)
    composed = set(key_paths(compose()))
    for group in ("trainer", "checkpoint", "optimizer", "scheduler", "peft"):
        paths = {
            path for path in composed if path.startswith(f"{group}.") and not path.endswith(("_target_", "_partial_"))
        }
        leaves = {path for path in paths if not any(other.startswith(f"{path}.") for other in paths)}
        assert leaves <= listed, leaves - listed
        for one in conf_options.of_group(CONF_DIR, group):
            assert one.option.comment or any(
                one.option.key.startswith(f"{other.option.key}.") and other.option.comment
                for other in conf_options.of_group(CONF_DIR, group)
            ), one.option.key


def test_a_choice_has_its_own_values():
    """What it includes, and over that what it says itself, as composing has them."""
    cfg = compose(["model=qwen3_8b"])
    for option in conf_options.of_choice(CONF_DIR, "model", "qwen3_8b"):
        node = cfg
        for part in option.key.split("."):
            node = node[part]
        if isinstance(node, int | float | str | bool | None):
            assert yaml.safe_load(option.default) == node or float(option.default) == node, option.key


def test_a_key_that_some_choices_have_names_them():
    assert any(
        re.fullmatch(r"  data\.format\.prompt=\S+   \(custom, prompt_completion\)", line) for line in lines("data")
    )
    assert "  hydra.launcher.time=null   (slurm)" in lines("hydra/launcher") == lines("hydra.launcher")
    assert lines("trainer.early_stopping")[-2] == "  trainer.early_stopping.min_delta=0.0"
    assert lines("seed")[0] == "  seed=1234"


@pytest.mark.parametrize(
    "name, said",
    [
        ("traner", "no group of keys; did you mean `trainer`; there are model, "),
        ("data=cstom", "no such choice; did you mean `custom`; there are alpaca, "),
        ("trainer.recompte", "no such key; did you mean `trainer.recompute`; all of them: python -m posttrain options"),
    ],
)
def test_what_there_is_not(name, said):
    with pytest.raises(UserError, match=said):
        lines(name)


def test_a_reader_that_has_seen_enough(tmp_path):
    """`| head`: no traceback."""
    command = f"{sys.executable} -m posttrain options model | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("model=") and not done.stderr
