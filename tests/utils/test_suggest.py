"""The nearest name: whole, by its last part, or none."""

import pytest

from posttrain.utils.suggest import did_you_mean, edit_distance, nearest

KEYS = ["optimizer.lr", "optimizer.weight_decay", "trainer.max_steps", "peft.rank"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimzer.lr", "optimizer.lr"),
        ("trainer.maxsteps", "trainer.max_steps"),
        ("weight_decay", "optimizer.weight_decay"),  # without its group
        ("data.rank", "peft.rank"),  # in the wrong group
        ("zzz", None),
        ("learning_rate", None),  # no slip of the fingers leads from there to optimizer.min_lr or to a scale
        ("trainer.save_steps", None),
        ("trainer.max_stesp", "trainer.max_steps"),
    ],
)
def test_nearest(name, expected):
    assert nearest(name, KEYS) == expected


def test_nothing_is_guessed_between_two():
    assert nearest("name", ["run.name", "template.name"]) is None
    assert nearest("run.nmae", ["run.name", "template.name"]) == "run.name"


@pytest.mark.parametrize(
    "left, right, distance",  # of https://en.wikipedia.org/wiki/Levenshtein_distance, and its examples with swaps
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("ca", "abc", 3), ("rnak", "rank", 1), ("", "abc", 3)],
)
def test_edit_distance(left, right, distance):
    assert edit_distance(left, right) == edit_distance(right, left) == distance


def test_the_end_of_a_message():
    assert did_you_mean("rnak", ["rank"]) == "; did you mean `rank`?"
    assert did_you_mean("zzz", iter(KEYS)) == ""
