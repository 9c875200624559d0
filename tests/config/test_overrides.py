"""A value written as an override is read back by Hydra as the same value."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.composition import CONF_DIR
from posttrain.config.overrides import format_override, list_globs, quote_expressions
from posttrain.errors import UserError

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


@pytest.mark.parametrize(
    "expression",
    ['lang == "en"', "lang == 'en' && !has(row.x)", "has(row.lang)", "size(text)>5", 'text.matches("^\\\\d+$")',
     '"en" in langs', 'lang in ["en", "de"]', "meta.ok", 'row["a b"] == "it\'s"', "a==1"],
)  # fmt: skip
def test_an_expression_is_read_as_it_is_typed(expression):
    """As a shell hands it on, without the outer quotes; or in quotes of Hydra's."""
    typed = [f"data.where={expression}", format_override("data.where", expression), "peft.rank=8", "--multirun"]
    for quoted in quote_expressions(typed)[:2]:
        assert PARSER.parse_override(quoted).value() == expression
    assert quote_expressions(typed)[2:] == typed[2:]
    assert quote_expressions(quote_expressions(typed)) == quote_expressions(typed)
    assert PARSER.parse_override(quote_expressions(["data.where=a,b"])[0]).is_sweep_override()


def test_a_pattern_of_choices_is_the_choices(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "mine.yaml").write_text("")
    words = ["model=gpt2", "scheduler=glob(*,exclude=w*)", "logger=glob([c*,t*])", "data.where='glob(x)'"]
    listed = list_globs(words, [CONF_DIR, tmp_path])
    schedulers = sorted({path.stem for path in (CONF_DIR / "scheduler").glob("[!w]*.yaml")} | {"mine"})
    assert listed == [
        "model=gpt2", f"scheduler={','.join(schedulers)}", "logger=csv,tensorboard,trackio", "data.where='glob(x)'",
    ]  # fmt: skip
    for wrong in ("scheduler=glob(x*)", "optimizer.lr=glob(*)"):
        with pytest.raises(UserError, match="no file of a group is called so"):
            list_globs([wrong], [CONF_DIR])
