"""What is drawn: a live line of the terminal's own width, and plain lines in a pipe."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
import time

import pytest
from rich.cells import cell_len

from posttrain.train.console import LiveLine, RankScreen, Screen, ScreenPipe
from posttrain.utils.rank_environment import UI_FD

VALUES = {
    "loss": 2.80367,
    "lr": 1e-3,
    "grad_norm": 1.27,
    "supervised_tokens_per_second": 12_345.0,
    "tokens_per_second": 34_567.0,
    "mfu": 0.41,
    "step_seconds": 80.4,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
# A child on a terminal: draws once for each line that it reads, and ends its live line at the end of its input.
CHILD = """
    import sys
    from posttrain.train import console
    console.REFRESH_S = 0.001
    screen = console.Screen.of_command()
    screen.start(3, 100)
    screen.phase("training")
    screen.step(4, VALUES)
    for line in sys.stdin:
        screen.print("[bold]a line that stays[/]" if line.strip() == "print" else "")
        screen.refresh()
        print("drawn", file=sys.stderr, flush=True)
    screen.stop()
"""


def line_at(width, step=4, steps=100):
    line = LiveLine()
    line.phase("training", 0, 0)
    line.step, line.steps, line.eta = step, steps, 8_040.0
    line.numbers = ["loss 2.8037", "lr 1.00e-03", "norm 1.27", "12,345 supervised tok/s of 34,567", "MFU 41%"]
    return line.text(width)


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
def test_a_line_fits_and_loses_what_matters_least(width):
    text = line_at(width)
    assert cell_len(text) <= width and "training" in text
    assert ("step 4/100" in text) == (width > 20)
    assert ("eta 2 h 14 min" in text and "loss 2.8037" in text) == (width >= 60)
    assert ("12,345 supervised tok/s of 34,567" in text) == (width >= 120)
    assert ("MFU 41%" in text and "╌" in text) == (width >= 200)


def test_phases_without_a_training():
    line = LiveLine()
    line.phase("validating", 3, 24)
    line.since -= 75
    assert line.text(80)[2:] == "validating 3/24  1 min 15 s"
    line.phase("validating", 4, 24)
    assert line.text(80)[2:] == "validating 4/24  1 min 15 s", "the same phase goes on"
    line.phase("exporting", 0, 0)
    assert line.text(80)[2:] == "exporting  0 s"


def read_for(descriptor, seconds=0.3):
    """What comes within some time of silence."""
    text = b""
    while select.select([descriptor], [], [], seconds)[0]:
        try:
            text += os.read(descriptor, 1 << 16)
        except OSError:  # the other end is closed
            break
    return text.decode()


def resize(descriptor, columns):
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def test_the_line_has_the_width_of_the_terminal_and_follows_it():
    parent, terminal = pty.openpty()
    resize(parent, 80)
    code = textwrap.dedent(CHILD).replace("VALUES", repr(VALUES))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},  # pytest's
        stdin=subprocess.PIPE,
        stdout=terminal,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    os.close(terminal)
    widths = {}
    for columns in (60, 80, 120):
        resize(parent, columns)
        read_for(parent)
        child.stdin.write(b"draw\n")
        assert child.stderr.readline() == b"drawn\n"
        drawn = read_for(parent)
        lines = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn)) if "step" in line]
        widths[columns] = max(map(cell_len, lines))
        assert "step 4/100" in lines[-1] and "eta 2 h 9 min" in lines[-1]
    assert widths[60] < 60 and 60 <= widths[80] < 80 and 80 <= widths[120] < 120
    child.stdin.write(b"print\n")
    child.stdin.close()
    assert child.wait(30) == 0
    end = read_for(parent)
    assert "a line that stays" in end and "\x1b[?25h" in end, "the cursor is there again"
    os.close(parent)


def test_a_pipe_gets_lines_without_control_characters(monkeypatch):
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = io.StringIO()
    screen = Screen(file)
    screen.phase("validating", 1, 24)
    screen.print("[bold]what is trained[/]")
    screen.start(0, 100)
    for step in range(1, 101):
        now += 3.0
        screen.phase("training")
        screen.step(step, VALUES)
        screen.refresh()
    screen.stop()
    first, *steps = file.getvalue().splitlines()
    assert steps.pop(1) == "from here a line every 10 s; each step is in metrics.jsonl"
    assert first == "what is trained" and not CONTROL.search(file.getvalue())
    assert [int(re.match(r"step (\d+)/100 ", line)[1]) for line in steps] == [*range(1, 100, 4), 100]
    assert steps[0].endswith("norm 1.27  12,345 supervised tok/s of 34,567  MFU 41%  eta 2 h 13 min")


def test_an_answer_of_empty_lines_takes_none():
    file = io.StringIO()
    sample = {"prompt": "Why?", "before": "\n" * 200, "after": "So.\n\n \nAnd so.", "reference": "Because."}
    Screen(file).result({"run_dir": "r"}, [sample])
    lines = file.getvalue().splitlines()
    assert sum("│" in line for line in lines) == 2
    assert any("So." in line and "Because." in line for line in lines)


@pytest.mark.parametrize("after, worse", [(4.18, True), (3.5, False)])
def test_a_model_that_is_worse_than_before_is_said_to_be(after, worse):
    file = io.StringIO()
    Screen(file).result({"val_loss_before": 3.72, "val_loss_after": after, "run_dir": "r"}, [])
    assert f"validation loss 3.7200 -> {after:.4f}" in file.getvalue()
    assert ("worse than before training" in file.getvalue()) == worse
    assert ("python -m posttrain --rerun r optimizer.lr=" in file.getvalue()) == worse


def test_the_end_of_a_run_says_how_to_go_on():
    """The directory is quoted for the shell."""
    file = io.StringIO()
    Screen(file).result({"run_dir": "a run", "export": "a run/adapter", "steps": 2, "exported_step": 2}, [])
    assert file.getvalue().splitlines() == [
        "run directory: a run",
        "export: a run/adapter",
        "ask it: python -m posttrain.generate 'a run' 'your question'",
        "its curves as a page: python -m posttrain.report 'a run'",
    ]


def test_what_a_rank_says_is_drawn_by_the_launcher(monkeypatch):
    pipe = ScreenPipe()
    monkeypatch.setenv(UI_FD, str(pipe.inherited))
    rank = RankScreen()
    file = io.StringIO()
    screen = Screen(file)
    rank.phase("loading the model")
    rank.print("[bold]ü[/]")
    rank.start(0, 1)
    rank.step(1, VALUES | {"loss": float("nan"), "grad_norm": None})
    pipe.show(screen)
    assert screen.line.name == "loading the model"
    os.write(pipe.inherited, b'["print", "half of a mess')
    pipe.show(screen)
    os.write(pipe.inherited, b'age"]\n["__class__"]\n')
    pipe.show(screen)
    assert file.getvalue().splitlines()[0] == "ü" and file.getvalue().splitlines()[-1] == "half of a message"
    assert "step 1/1  loss nan  lr 1.00e-03  12,345" in file.getvalue()
    pipe.started()
    pipe.close()


def test_a_rank_never_waits_to_show_a_step(monkeypatch):
    """The launcher is suspended: nobody reads."""
    pipe = ScreenPipe()
    monkeypatch.setenv(UI_FD, str(pipe.inherited))
    rank = RankScreen()
    began = time.monotonic()
    for step in range(5_000):
        rank.step(step, VALUES)
    assert time.monotonic() - began < 30
    screen = Screen(io.StringIO())
    pipe.show(screen)
    assert 0 < screen.line.step < 4_999
    pipe.started()
    pipe.show(screen)  # the rank has ended
    pipe.close()


def test_other_ranks_draw_nothing(monkeypatch, capfd):
    monkeypatch.delenv(UI_FD, raising=False)
    rank = RankScreen()
    rank.phase("training")
    rank.print("x")
    rank.step(1, VALUES)
    rank.result({}, [])
    assert capfd.readouterr() == ("", "")


def test_every_method_of_a_screen_has_its_counterpart():
    assert all(callable(getattr(Screen, name)) and callable(getattr(RankScreen, name)) for name in ScreenPipe.METHODS)
