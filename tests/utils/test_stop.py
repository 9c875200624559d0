"""How commands end by signals, and what they do without a terminal."""

import ast
import os
import pty
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import posttrain
from posttrain.utils import stop

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
    import os, signal, sys, tempfile, time
    from posttrain.utils import stop

    @stop.command
    def main():
        with tempfile.TemporaryDirectory(dir=sys.argv[1]):
            forks = sys.argv[2:] == ["fork"]
            if not forks or not os.fork():
                # Of two processes the forked one says so: a signal sent before it exists would not reach it.
                print("ready", flush=True)
            time.sleep(60)

    main()
"""


def started(folder, *words, **options):
    """A command that waits, once it does."""
    (folder / "scratch").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMMAND), str(folder / "scratch"), *words], text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_in_one_line_and_its_scratch_goes(name, tmp_path):
    process = started(tmp_path)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert err == f"posttrain: stopped by {name}\n"
    assert not list((tmp_path / "scratch").iterdir())


def test_a_forked_process_says_nothing_of_its_own(tmp_path):
    process = started(tmp_path, "fork", start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "posttrain: stopped by SIGTERM\n"


def test_nohup_stays_in_force(tmp_path):
    process = started(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_ctrl_c_during_the_imports_is_one_line():
    """The first line of the command's module has been reached when Hydra is looked for."""
    code = """
        import importlib.abc, os, runpy, signal, sys
        class Press(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "hydra":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Press())
        sys.argv = ["posttrain"]
        runpy.run_module("posttrain", run_name="__main__", alter_sys=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and done.stderr == "posttrain: stopped by SIGINT\n"


def test_a_command_by_its_module_shows_at_once_that_it_works_and_ends_in_one_line(tmp_path):
    """Ctrl-C comes when Hydra has been imported half."""
    press = """
        import importlib.abc, os, signal, sys, time
        class Press(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "hydra.core":
                    time.sleep(1)
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Press())
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(press))
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TERM": "xterm"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "posttrain.preview"], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    assert process.wait(timeout=60) == 130
    shown = os.read(ours, 1 << 16).decode()
    assert "starting" in shown and shown.endswith("posttrain: stopped by SIGINT\r\n") and "Traceback" not in shown


def test_writing_to_a_terminal_that_is_gone_is_no_error():
    master, terminal = os.openpty()
    stream = stop.tolerant_stream(terminal)
    print("seen", file=stream)
    assert os.read(master, 100).strip() == b"seen"
    os.close(master)
    print("not seen", file=stream)
    stream.close()
    os.close(terminal)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed):
    """A mistake is found as ever, and no file is taken for a standard stream."""
    command = f'exec "{sys.executable}" -m posttrain seedd=1 {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "unknown key" in done.stderr + done.stdout or "2>&-" in closed


@pytest.mark.parametrize("limit, told", [("-n 20", "open files"), ("-s 256", "bytes of stack")])
def test_limits_too_low_for_torch(limit, told):
    """A hard limit is a mistake that is named; a soft one is raised."""
    command = f'"{sys.executable}" -m posttrain seedd=1'
    hard = subprocess.run(["bash", "-c", f"ulimit {limit}; {command}"], capture_output=True, text=True, cwd=ROOT)
    assert hard.returncode == 2 and hard.stderr.count("\n") == 1 and told in hard.stderr, hard.stderr
    soft = subprocess.run(["bash", "-c", f"ulimit -S {limit}; {command}"], capture_output=True, text=True, cwd=ROOT)
    assert soft.returncode == 2 and "unknown key" in soft.stderr


@pytest.mark.parametrize(
    "locale, word", [({}, b"data.path=/d\xe4ta"), ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "data.path=/dä")]
)
def test_words_that_are_not_utf_8_are_refused(locale, word):
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", word], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONCOERCECLOCALE": "0", **locale},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is not UTF-8" in done.stderr, done.stderr


def test_without_a_folder_for_temporary_files():
    """Every folder that Python tries is as if it could not be written to, which the superuser always can."""
    code = """
        import tempfile
        from posttrain.utils import stop
        tempfile._candidate_tempdir_list = lambda: ["/proc/nowhere"]
        stop.command(tempfile.TemporaryFile)()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("posttrain: TMPDIR: ") and done.stderr.count("\n") == 1


def test_a_traceback_for_those_who_ask_for_it():
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "trainer.max_steps=-1"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "HYDRA_FULL_ERROR": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_other_letters_under_the_plainest_locale(tmp_path):
    (tmp_path / "dätä.jsonl").write_text('{"text": "ü"}\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "data=messages", f"data.path='{tmp_path}/dätä.jsonl'", "--cfg", "job"],
        capture_output=True, encoding="utf-8", cwd=ROOT, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0 and "dätä.jsonl" in done.stdout


def test_text_files_are_read_and_written_as_utf_8_whatever_the_locale():
    """Every call of the package that opens text says so."""
    silent = []
    for path in [*ROOT.glob("posttrain/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            owner = getattr(getattr(call.func, "value", None), "id", "")
            opens = name in ("read_text", "write_text", "fdopen") or (name == "open" and owner not in ("os", "self"))
            binary = any(isinstance(word, ast.Constant) and "b" in str(word.value) for word in call.args)
            named = any(word.arg == "encoding" for word in call.keywords)
            # Functions of posttrain.utils.atomic_files and posttrain.utils.rundir, whose text is UTF-8 always.
            ours = owner == "rundir" or (name in ("read_text", "write_text") and isinstance(call.func, ast.Name))
            if opens and not (binary or named or ours):
                silent.append(f"{path.name}:{call.lineno} {ast.unparse(call)}")
    assert not silent


def test_version_is_ours():
    done = subprocess.run([sys.executable, "-m", "posttrain", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"posttrain {posttrain.__version__}\n")


@pytest.mark.parametrize("module", ["posttrain", "posttrain.plan"])
def test_outside_of_the_environment_the_way_in_is_said(module):
    """With -S and -E Python finds none of the environment's packages."""
    done = subprocess.run([sys.executable, "-SE", "-m", module], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "source .venv/bin/activate" in done.stderr and "make setup" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_end_of_a_command_is_no_search_for_garbage():
    code = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # called after those that come later
from posttrain.utils import stop
stop.command(lambda: None)()
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout == "True\n", done.stderr
