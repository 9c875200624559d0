"""A value written as an override is read back by Hydra as the same value."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.overrides import format_override

PARSER = OverridesParser.create()


@pytest.mark.parametrize(
    "value",
    [None, True, False, 3, 1e-5, 0.1, "plain", "a/b-c.json", "hf://owner/name@train[:5%]", "with space", "it's",
     "ü/模型.json", "1e-4", "null", "12", "", "a,b", "x=y", "$HOME", "C:\\new",
     [1, "a b", None], ["linear_qkv", "q_proj"], {"a": 1, "b": "c d"}],
)  # fmt: skip
def test_round_trip(value):
    assert PARSER.parse_override(format_override("key", value)).value() == value


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20))
def test_any_text(text):
    assert PARSER.parse_override(format_override("key", text)).value() == text
