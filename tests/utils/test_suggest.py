"""The nearest name: whole, by its last part, or none."""

import pytest

from posttrain.utils.suggest import did_you_mean, nearest

KEYS = ["optimizer.lr", "optimizer.weight_decay", "trainer.max_steps", "peft.rank"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimzer.lr", "optimizer.lr"),
        ("trainer.maxsteps", "trainer.max_steps"),
        ("weight_decay", "optimizer.weight_decay"),  # without its group
        ("data.rank", "peft.rank"),  # in the wrong group
        ("zzz", None),
    ],
)
def test_nearest(name, expected):
    assert nearest(name, KEYS) == expected


def test_the_end_of_a_message():
    assert did_you_mean("rnak", ["rank"]) == "; did you mean `rank`?"
    assert did_you_mean("zzz", iter(KEYS)) == ""
