"""The help screen names everything there is; the shell completes it."""

import contextlib
import importlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.cli import help_screen, subcommands
from posttrain.config.composition import CONF_DIR, PACKAGE

SCREEN = help_screen.render(CONF_DIR, PACKAGE)


def test_it_is_one_screen():
    lines = SCREEN.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100


def test_every_group_is_there_with_its_choices():
    rows, name = {}, ""
    for line in SCREEN.splitlines():
        if line.startswith("  "):
            name, words = (line.split()[0], line.split()[1:]) if line[2] != " " else (name, line.split())
            rows.setdefault(name, set()).update(words)
    for group in (path for path in CONF_DIR.iterdir() if path.is_dir() and path.name not in ("hydra", "model")):
        assert {path.stem for path in group.glob("*.yaml")} <= rows[group.name], group.name


@pytest.mark.parametrize("name", ["llama3_{70b*,8b*}", "gpt2_{,large,medium,xl}", "llama33_70b_instruct"])
def test_models_are_shortened_by_family(name):
    assert name in SCREEN.split()


def test_every_command_is_there_and_says_what_it_is_for():
    found = dict(subcommands.summaries(PACKAGE))
    assert {"convert", "doctor", "evaluate", "generate", "plan", "preview", "report"} <= set(found)
    assert "worker" not in found and "posttrain" not in found
    for name, summary in found.items():
        assert 10 < len(summary) < 90 and "`" not in summary, name
        assert f"  {name} " in SCREEN and summary in " ".join(SCREEN.split())


@pytest.mark.parametrize(
    "docstring, expected",
    [
        ("`python -m posttrain.x`: what it does.\n\nMore.", "what it does"),
        ("Ask a model: `python -m posttrain.x A`.", "ask a model"),
        ("Do this, `python -m posttrain.x FILE`, and that.", "do this"),
        ("One; two.", "one"),
    ],
)
def test_summary(docstring, expected):
    assert subcommands.summarize(docstring) == expected


def test_it_is_quick_and_loads_nothing_heavy():
    program = (
        "import sys; sys.argv = ['posttrain', '--help']; import posttrain.__main__ as m; m.main();"
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == f"{SCREEN}\n[]\n"
    # The processor's time, since other tests run beside this one: 0.45 s; torch alone would take 3.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize("name", [name for name, _ in subcommands.summaries(PACKAGE)])
def test_every_command_explains_itself(name, monkeypatch, capsys):
    """With its own words, not with Hydra's screen."""
    package = (PACKAGE / name / "__main__.py").is_file()
    module = importlib.import_module(f"posttrain.{name}.__main__" if package else f"posttrain.{name}")
    monkeypatch.setattr(sys, "argv", [f"posttrain.{name}", "--help"])
    with contextlib.suppress(SystemExit):
        module.main()
    out = " ".join(capsys.readouterr().out.split())
    assert subcommands.summarize(module.__doc__).lower() in out.lower() and "Hydra" not in out, out


def command(folder: Path) -> None:
    """Put the `posttrain` command into `folder`."""
    script = folder / "posttrain"
    program = "from posttrain.cli.subcommands import main; main()"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    script.chmod(0o755)


def with_command(folder: Path) -> dict[str, str]:
    """An environment that finds it."""
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(PACKAGE.parent)}


def completions(typed: str, tmp_path: Path) -> list[str]:
    """What bash offers after `typed`, with the completion installed as the documentation says."""
    command(tmp_path)
    program = f"""
        eval "$({sys.executable} -m posttrain -sc install=bash)"
        complete -p posttrain >&2
        ! complete -p python 2> /dev/null || exit 3
        COMP_LINE={typed!r}; COMP_POINT=${{#COMP_LINE}}; words=($COMP_LINE); COMP_CWORD=$(( ${{#words[@]}} - 1 ))
        hydra_bash_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, env=with_command(tmp_path), cwd=tmp_path
    )
    assert done.returncode == 0 and "hydra_bash_completion posttrain" in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_choices_and_keys(tmp_path):
    expected = {f"model={path.stem}" for path in (CONF_DIR / "model").glob("llama3_*.yaml")}
    assert set(completions("posttrain model=llama3_", tmp_path)) == expected and len(expected) == 4
    assert completions("posttrain peft=dora peft.ra", tmp_path) == ["peft.rank="]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes_choices(tmp_path):
    command(tmp_path)
    program = "posttrain -sc install=fish | source; complete -C 'posttrain model=llama3_'"
    found = subprocess.run(
        ["fish", "--no-config", "-c", program], capture_output=True, text=True, env=with_command(tmp_path), cwd=tmp_path
    )
    assert "model=llama3_8b_instruct" in found.stdout.split(), found.stderr


def test_what_fish_asks_is_answered(tmp_path):
    command(tmp_path)
    env = with_command(tmp_path) | {"COMP_LINE": "posttrain model=llama3_"}
    done = subprocess.run(["posttrain", "-sc", "query=fish"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert len(done.stdout.split()) == 4 and "model=llama3_8b_instruct" in done.stdout.split(), done.stderr


@pytest.mark.parametrize("name", ["plan", "preview", "evaluate", "convert"])
def test_a_commands_options_are_those_of_its_file(name):
    options = help_screen.options(CONF_DIR / f"{name}.yaml")
    own = yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text())[name]
    assert all(f"  {name}.{key}=" in options for key in own) and "hydra." not in options
    assert max(map(len, options.splitlines())) <= 100


def test_help_of_a_command_lists_its_options():
    done = subprocess.run([sys.executable, "-m", "posttrain.plan", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "  plan.read_data=true\n      read the data: " in done.stdout
