"""What comes from outside doesn't act on the terminal."""

import pytest

from posttrain.generate import __main__
from posttrain.utils import stop
from posttrain.utils.escape import escape_control

TITLE = "\x1b]0;owned\x07"


def test_control_characters_are_spelt_out():
    assert escape_control(f"a\tb\n{TITLE}\x9b31m\x7f é ✓") == "a\tb\n\\x1b]0;owned\\x07\\x9b31m\\x7f é ✓"


def test_an_error_that_quotes_a_file(capsys):
    with pytest.raises(SystemExit):
        stop.fail(f"unknown role {TITLE}\nsecond line")
    assert capsys.readouterr().err == "posttrain: unknown role \\x1b]0;owned\\x07\nsecond line\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer(terminal, capsys, monkeypatch):
    """Harmless on a terminal, as it is in a file."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    __main__.print_answer("q", TITLE, as_json=False)
    assert ("\x1b" in capsys.readouterr().out) == (not terminal)


def test_prompts_with_the_line_ends_of_unicode(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    (prompt,) = __main__.read_prompts(path)
    assert prompt.messages[0].content == "one\u2028two"
