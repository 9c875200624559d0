"""Home directories in paths: found, or refused in one line."""

from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.utils.user_paths import expand_home

PACKAGE = Path(__file__).resolve().parents[2] / "posttrain"


def test_homes_are_those_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a b") == tmp_path / "a b"
    assert expand_home("~root") == Path("~root").expanduser()
    assert expand_home(Path("a/~b")) == Path("a/~b")


@pytest.mark.parametrize("path", ["~nobody-here", "~nobody-here/a.json"])
def test_a_home_of_nobody(path):
    with pytest.raises(
        UserError, match=f"{path}: ~nobody-here is the home directory of nobody on this machine; .* ./{path}"
    ):
        expand_home(path)


def test_no_home_is_looked_up_elsewhere():
    """Path.expanduser ends in a traceback where there is no such user."""
    found = [path.name for path in PACKAGE.rglob("*.py") if ".expanduser(" in path.read_text()]
    assert found == ["user_paths.py"]


def test_commands_refuse_it_in_one_line(monkeypatch, capsys):
    from posttrain import preview
    from posttrain.evaluate.__main__ import main as evaluate
    from posttrain.generate.__main__ import main as generate
    from posttrain.primus.__main__ import main as primus

    commands = (
        (evaluate, ["~nobody-here"]),
        (generate, ["~nobody-here", "a question"]),
        (primus, ["~nobody-here/a.yaml"]),
        (preview.main, ["data=alpaca", "data.path='~nobody-here/a.json'"]),
    )
    for main, arguments in commands:
        monkeypatch.setattr("sys.argv", ["posttrain", *arguments])
        with pytest.raises(SystemExit, match="2"):
            main()
        said = capsys.readouterr().err
        assert "~nobody-here is the home directory of nobody on this machine" in said and said.count("\n") == 1
