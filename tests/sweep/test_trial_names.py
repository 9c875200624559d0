"""Names of sweeps and trials: stable where the result is the same, different where it is not."""

import pytest

from posttrain.config.trial_names import (
    check_swept,
    difference,
    flatten,
    sweep_name,
    swept_keys,
    swept_ranges,
    trial_name,
)
from posttrain.errors import UserError

GRID = ["optimizer.lr=1e-4,2e-4", "peft.rank=8,16", "model=llama3_8b"]


def test_swept_keys_are_those_with_several_values():
    assert swept_keys(GRID, None) == ["optimizer.lr", "peft.rank"]
    assert swept_keys(["data.path='a,b'", "data.truncation_side=[a,b]"], None) == []
    assert swept_keys(["seed=1,2"], {"optimizer.lr": "tag(log,interval(1e-5,1e-3))"}) == ["optimizer.lr", "seed"]


def test_what_would_be_one_trial_is_refused():
    check_swept(swept_ranges(GRID, {"seed": "range(1,3)"}))
    for override in ("logger=csv,tensorboard", "launch.nnodes=1,2", "run.name=a,b"):
        with pytest.raises(UserError, match=rf"^`{override}`: trials of a sweep differ in what they compute"):
            check_swept(swept_ranges([*GRID, override], None))


@pytest.mark.parametrize(
    "other, same",
    [
        (["model=llama3_8b", "peft.rank=8,16,32", "optimizer.lr=5e-4,6e-4"], True),  # order and more values
        ([*GRID, "logger=wandb", "run.name=x", "sweep.parallel=2"], True),
        ([*GRID, "seed=2"], False),
        ([*GRID[:2], "model=llama3_70b"], False),
        ([GRID[0], "peft.rank=8", "model=llama3_8b"], False),
        (["peft.rank=8,16", "optimizer.lr=1e-4,2e-4", "model=llama3_8b"], True),
    ],
)
def test_sweep_name(other, same):
    name = sweep_name(None, GRID, None)
    assert name.startswith("lr-rank-")
    assert (sweep_name(None, other, None).rpartition("-")[2] == name.rpartition("-")[2]) is same


def test_a_given_sweep_name_is_kept_and_made_safe():
    assert sweep_name("night run", GRID, None) == "night_run"
    assert "/" not in sweep_name("../../etc", GRID, None)


@pytest.mark.parametrize(
    "overrides, swept, name",
    [
        (["optimizer.lr=1e-4", "peft.rank=8", "seed=1"], ["optimizer.lr", "peft.rank"], "lr=0.0001,rank=8"),
        (["optimizer.lr=0.0001"], ["optimizer.lr"], "lr=0.0001"),
        (["peft=none"], ["peft"], "peft=none"),
        (["a.lr=1", "b.lr=2"], ["a.lr", "b.lr"], "a.lr=1,b.lr=2"),
        (["seed=1"], [], "trial"),
        (["+trainer.megatron.x=null"], ["trainer.megatron.x"], "x=null"),
    ],
)
def test_trial_name(overrides, swept, name):
    assert trial_name(overrides, swept) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [("optimizer.lr=10", "optimizer.lr=10.0"), ("data.path=./a.jsonl", "data.path=a.jsonl"),
     ("data.path=[./a,b]", "data.path=[a,././b]"), ("x={a:1.0}", "x={a:1}")],
)  # fmt: skip
def test_one_name_for_what_means_the_same(one, other):
    key = one.partition("=")[0]
    assert trial_name([one, "seed=1"], [key]) == trial_name(["seed=1", other], [key])
    grid = "peft.rank=8,16"
    assert sweep_name(None, [grid, one], None) == sweep_name(None, [other, grid], None)


def test_hidden_files_and_parents_keep_their_dots():
    names = {trial_name([f"data.path={path}"], ["data.path"]) for path in (".a", "a", "../a", ".", "./")}
    assert len(names) == 5


def test_long_numbers_are_shortened_and_stay_different():
    a, b = (
        trial_name([f"optimizer.lr={lr}"], ["optimizer.lr"]) for lr in (0.00010398120940275099, 0.00010398120940275)
    )
    assert a.startswith("lr=0.000104-") and b.startswith("lr=0.000104-") and a != b


def test_trial_names_that_lose_characters_stay_different():
    a, b = (trial_name([f"data.path='{path}'"], ["data.path"]) for path in ("x/y", "x y"))
    assert a != b and "/" not in a
    long = {trial_name([f"data.path={'x' * 300}{i}"], ["data.path"]) for i in range(3)}
    assert len(long) == 3 and all(len(name) < 200 for name in long)


def test_difference_leaves_places_out():
    old = flatten({"seed": 1, "run": {"name": "a"}, "peft": {"rank": 8, "target_modules": ["q"]}})
    new = flatten({"seed": 2, "run": {"name": "b"}, "peft": {"rank": 8, "target_modules": ["q"], "alpha": None}})
    assert difference(old, new) == ["seed: 1 -> 2"]
    assert difference({"data.path": "./a", "optimizer.lr": 10}, {"data.path": "a", "optimizer.lr": 10.0}) == []
