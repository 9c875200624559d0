"""Watching the ranks of a run: who died first, what they leave behind, which signal means what.

The launcher is the real one; in the ranks' place are processes of a few lines, which need no model.
"""

import json
import os
import pty
import select
import signal
import socket
import sys
import textwrap
import threading
import time

import psutil
import pytest

from posttrain.config.composition import compose
from posttrain.errors import RunFailed, UserError
from posttrain.launch import fork_server, launcher, node_run, nodes
from posttrain.launch.rank_process import base_environment
from posttrain.launch.signals import SignalRelay
from posttrain.train.console import Screen

COMMON = """
    import json, os, signal, subprocess, sys, time
    rank, logs = int(os.environ["RANK"]), os.path.join(sys.argv[-1], "logs")
    def error(**more):
        with open(os.path.join(logs, f"rank{rank}.error.json"), "w") as file:
            json.dump({"rank": rank, "time": time.time(), "user_error": False, **more}, file)
"""
SERVER = """
    import sys
    from posttrain.launch import fork_server
    if sys.argv[-2] == fork_server.OPTION:
        sys.argv.append(fork_server.serve(int(sys.argv[-1])))
"""
started_and_forked = pytest.mark.parametrize("ranks", ["started", "forked"], indirect=True)


@pytest.fixture
def ranks(tmp_path, monkeypatch, request):
    """Start `count` ranks that run the code; returns the NodeRun."""
    forked = getattr(request, "param", "started") == "forked"

    def start(code, count=2, *words):
        script = tmp_path / "rank.py"
        script.write_text("".join(map(textwrap.dedent, [SERVER if forked else "", COMMON, code])))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        (tmp_path / "logs").mkdir(exist_ok=True)
        cfg = compose([f"parallelism.nproc_per_node={count}", *words])
        if forked:
            fork_server.ensure(base_environment(0, count))
        return node_run.NodeRun(cfg, tmp_path, 0, relay)

    monkeypatch.setattr(fork_server, "_servers", servers := [])
    with SignalRelay() as relay:
        yield start
    for server in servers:
        server.close()
        assert server.process.wait(timeout=60) == 0


def test_the_rank_that_was_killed_is_named_though_another_fails_of_it_first(ranks):
    run = ranks("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        error(message="connection closed by peer")
        os._exit(1)
    """)
    deadline = time.monotonic() + 60
    while any(psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE for process in run.processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(RunFailed, match=r"rank 1 was killed by SIGKILL \(out of memory\?\)\n.*rank1\.log"):
        run.wait()


@started_and_forked
def test_what_the_first_rank_draws_is_there_when_it_has_ended(ranks, capfd):
    run = ranks("""
        if rank == 0:
            for message in (["phase", "training", 0, 0], ["print", "[bold]a line[/]"], ["print", "the last"]):
                os.write(int(os.environ["POSTTRAIN_UI_FD"]), json.dumps(message).encode() + b"\\n")
        else:
            assert "POSTTRAIN_UI_FD" not in os.environ
    """)
    run.wait()
    assert run.screen.live is None and capfd.readouterr().out == "a line\nthe last\n"


def test_ctrl_c_is_answered_on_a_terminal(ranks):
    parent, terminal = pty.openpty()
    run = ranks("time.sleep(300)", 1)
    run.screen = Screen(os.fdopen(terminal, "w"))
    run.screen.phase("training")
    run.on_signal(signal.SIGINT)
    with pytest.raises(RunFailed, match="SIGINT"):
        run.wait()
    drawn = ""
    while select.select([parent], [], [], 0.5)[0]:
        drawn += os.read(parent, 1 << 16).decode()
    assert drawn.count("a step under way is finished and saved. Ctrl-C again stops at once") == 1
    assert run.screen.live is None and "\x1b[?25h" in drawn, "the cursor is there again"
    os.close(parent)


@started_and_forked
def test_the_first_of_two_errors_is_told(ranks):
    run = ranks("""
        time.sleep(0.5 * rank)
        error(message=f"this is rank {rank}", user_error=True)
        os._exit(2)
    """)
    with pytest.raises(UserError, match="this is rank 0"):
        run.wait()


@started_and_forked
def test_workers_of_a_rank_that_ignore_signals_are_ended(ranks, tmp_path):
    run = ranks("""
        ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        code = ignore + "print(1, flush=True); time.sleep(300)"
        worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        worker.stdout.readline()
        open(os.path.join(logs, f"worker{rank}"), "w").write(str(worker.pid))
        os._exit(rank)
    """)
    with pytest.raises(RunFailed, match="rank 1 ended with exit code 1"):
        run.wait()
    left = [int((tmp_path / "logs" / f"worker{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in left):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@started_and_forked
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_the_ranks_in_order(name, ranks):
    """Each rank saves on SIGTERM and leaves with its code for that; the command's code is 128 + the signal."""
    number = getattr(signal, name)
    run = ranks("""
        def leave(*_):
            os._exit(3)
        signal.signal(signal.SIGTERM, leave)
        open(os.path.join(logs, f"ready{rank}"), "w").close()
        time.sleep(60)
    """)

    def tell():
        while len(list((run.run_dir / "logs").glob("ready*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    with pytest.raises(RunFailed, match=f"stopped by {name} after saving") as stopped:
        run.wait()
    thread.join()
    assert stopped.value.exit_code == 128 + number and stopped.value.stopped and not stopped.value.restartable


def test_a_signal_after_the_ranks_have_ended_changes_nothing(ranks):
    """Slurm ends every node of a job in which one has failed: this node's failure came first."""
    run = ranks("""
        error(message="connection closed by peer")
        os._exit(1)
    """)
    for process in run.processes:
        process.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RunFailed, match=r"rank \d failed: connection closed by peer") as failed:
        run.wait()
    assert run.signalled_after_end and not failed.value.stopped


def test_a_signal_between_two_starts_is_for_the_second(ranks):
    for process in (first := ranks("os._exit(0)")).processes:
        process.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    assert first.signalled_after_end
    second = ranks("""
        time.sleep(120)
    """)
    with pytest.raises(RunFailed, match="stopped by SIGTERM") as stopped:
        second.wait()
    assert stopped.value.exit_code == 143


def test_a_signal_before_there_are_ranks_ends_the_command():
    with pytest.raises(RunFailed, match="stopped by SIGUSR2 before it began") as failed, SignalRelay():
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)
    assert failed.value.stopped and failed.value.exit_code == 128 + signal.SIGUSR2


def test_a_reserved_port_is_the_ranks_alone():
    """A rank listens on it seconds later (as torch's store does, with SO_REUSEADDR); nobody else gets it meanwhile."""
    with nodes.reserve_port() as held, socket.socket() as other, socket.socket() as rank:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        rank.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank.bind(("127.0.0.1", port))
        rank.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass


def test_ranks_that_go_back_are_started_again_without_counting(ranks, tmp_path, monkeypatch, capsys):
    """launch.max_restarts=0, and two rollbacks: the third time the run ends."""
    ranks("os._exit(0)").wait()  # the script's place; now with other code
    script = textwrap.dedent(COMMON) + textwrap.dedent("""
        count = os.path.join(logs, "starts")
        starts = open(count).read() if os.path.exists(count) else ""
        open(count, "w").write(starts + "x")
        if len(starts) < 2:
            error(message="step 3: loss is nan; going back", rolled_back=True)
            os._exit(1)
    """)
    (tmp_path / "rank.py").write_text(script)
    monkeypatch.setattr(launcher.resumption, "check", lambda *_: None)
    launcher.launch(compose(["parallelism.nproc_per_node=1"]), tmp_path, 0)
    assert (tmp_path / "logs" / "starts").read_text() == "xxx"
    assert capsys.readouterr().err.count("going back") == 2
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_what_ended_a_run_is_told_though_the_disk_has_become_full(tmp_path, monkeypatch):
    def record(cfg, run_dir, status):
        if status["state"] != "running":
            raise OSError(28, "No space left on device")

    def failing(*_):
        raise RunFailed("rank 0 failed: why")

    monkeypatch.setattr(launcher, "record", record)
    monkeypatch.setattr(launcher, "_run", failing)
    with pytest.raises(RunFailed, match="rank 0 failed: why"):
        launcher.launch(compose([]), tmp_path / "run", 0)
