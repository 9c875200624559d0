"""The transcript in docs/plan.md is what the command prints."""

import textwrap
from pathlib import Path

from posttrain.config.composition import compose
from posttrain.plan.__main__ import plan

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
COMMAND = "    $ python -m posttrain.plan "


def test_transcript(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    after = PAGE.read_text().partition(COMMAND)[2]
    words, _, rest = after.partition("\n")
    shown = rest.partition("\n\n## ")[0]
    plan(compose(words.split(), config_name="plan"), words.split())
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert textwrap.dedent(shown).splitlines() == printed
