"""Times as people say them."""

import pytest

from posttrain.utils.durations import format_duration


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (35, "35 s"),
        (59.7, "1 min"),
        (250, "4 min 10 s"),
        (3_599.6, "1 h"),
        (8_040, "2 h 14 min"),
        (8_069, "2 h 14 min"),
        (86_399, "1 d"),
        (14_264_986, "165 d 2 h"),
        (-3, "0 s"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_two_units_at_most(seconds, expected):
    assert format_duration(seconds) == expected
