"""The line that says what a command does: on a terminal below what is printed, elsewhere now and then."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time

import pytest

from posttrain.utils import working

# On a terminal: prints to both streams while the line lives, waits for the line between them, then ends or is ended.
CHILD = """
    import os, signal, sys, time
    from posttrain.utils import stop, working
    working.REFRESH_S = 0.01
    if "signal" in sys.argv:
        stop.exit_on_signals()
    working.begin("reading data")
    for name in ("first", "second"):
        working.phase("reading data", 1234, 5678, "rows")
        time.sleep(0.2)
        print(name, file=sys.stdout if name == "first" else sys.stderr)
    print("no end of line", end="")
    time.sleep(0.2)
    print(".")
    time.sleep(0.2)
    if "signal" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    working.stop()
    working.phase("nobody shows this")
    assert sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__
    print("last")
"""


def rows(drawn):
    """What a terminal shows in the end, line by line; carriage returns and clearing are all that is known."""
    shown = [""]
    for part in re.split(r"(\r\n|\r\x1b\[2K)", drawn):
        if part == "\r\n":
            shown.append("")
        elif part == working.CLEAR:
            shown[-1] = ""
        else:
            shown[-1] += part
    return shown


@pytest.mark.parametrize("how", ["", "signal"])
def test_what_is_printed_comes_above_the_line(how):
    parent, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), how],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(terminal)
    drawn = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and select.select([parent], [], [], 60)[0]:
        try:
            drawn += os.read(parent, 1 << 16)
        except OSError:  # the child has ended
            break
    os.close(parent)
    text = drawn.decode()
    last = "posttrain: stopped by SIGTERM" if how else "last"
    assert rows(text) == ["first", "second", "no end of line.", last, ""]
    assert child.wait() == (143 if how else 0)
    assert re.search(r"[⠋-⠿] reading data 1,234/5,678 rows  0 s", text)
    assert "nobody" not in text


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(working, "PLAIN_INTERVAL_S", 0.05)
    monkeypatch.setattr(working, "REFRESH_S", 0.005)
    working.begin("importing")
    try:
        deadline = time.monotonic() + 30
        while file.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        list(working.counted("abc", "answering", 3))
        assert working._line.phase.described() == "answering 3/3"
        advance = working.bytes_of("writing", 5 << 20)
        advance(3 << 20)
        assert working._line.phase.described() == "writing 3/5 MiB"
    finally:
        working.stop()
    assert file.getvalue().startswith("posttrain: importing  0 s\nposttrain: importing  0 s\n")
    assert sys.stderr is file and "\r" not in file.getvalue()
