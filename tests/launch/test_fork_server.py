"""Ranks that are forks of one process: what they get, what they leave to the next, how they end.

The server is the real one without imports; instead of training a rank runs a few lines.
"""

import contextlib
import json
import os
import signal
import sys
import textwrap
import time

import psutil
import pytest

from posttrain.launch import fork_server
from posttrain.launch.rank_process import base_environment

SCRIPT = """
    import json, os, signal, sys, time
    from posttrain.launch import fork_server
    kept = []
    print("imported", flush=True)
    time.sleep(float(os.environ.get("IMPORTS_S", 0)))
    run_dir = fork_server.serve(int(sys.argv[-1]))
    kept.append(os.environ["RANK"])
    seen = {
        "kept": kept, "pid": os.getpid(), "session": os.getsid(0), "cwd": os.getcwd(), "left": os.environ.get("LEFT"),
        "cores": sorted(os.sched_getaffinity(0)), "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "env": os.environ["MASTER_PORT"], "stdin": sys.stdin.read(), "files": len(os.listdir("/proc/self/fd")),
    }
    os.environ["LEFT"] = "something"
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    print("ran", flush=True)
    with open(os.path.join(run_dir, f"seen{os.environ['RANK']}.part"), "w") as file:
        json.dump(seen, file)
    os.rename(file.name, file.name.removesuffix(".part"))
    if os.environ["RANK"] == "1":
        time.sleep(300)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server's environment; the server is ended after the test."""
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SCRIPT))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(fork_server, "_servers", [])
    yield base_environment(0, 1)
    for server in fork_server._servers:
        server.process.kill()
        server.process.wait()


def start(tmp_path, env, rank=0):
    own = {"RANK": str(rank), "MASTER_PORT": str(10_000 + rank)}
    with open(tmp_path / f"log{rank}", "wb") as log:
        return fork_server.start_rank(tmp_path, log.fileno(), env | own, [])


def ended(process):
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process.returncode


def seen(tmp_path, rank):
    deadline = time.monotonic() + 60
    while not (tmp_path / f"seen{rank}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads((tmp_path / f"seen{rank}").read_text())


def test_ranks_that_follow_each_other_start_alike(tmp_path, server, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fork_server.ensure(server)
    files = set()
    for rank in (0, 2, 3):
        process = start(tmp_path, server, rank)
        assert ended(process) == 0
        found = seen(tmp_path, rank)
        assert found["kept"] == [str(rank)] and found["left"] is None and found["term"]
        assert found["env"] == str(10_000 + rank) and found["stdin"] == ""
        assert found["pid"] == found["session"] == process.pid
        assert found["cwd"] == str(tmp_path) and found["cores"] == sorted(os.sched_getaffinity(0))
        assert (tmp_path / f"log{rank}").read_text() == "imported\nran\n"
        files.add(found["files"])
    assert len(files) == 1, "descriptors are left open"
    fork_server.ensure(server)
    assert len(fork_server._servers) == 1


def wait_for_end(pid):
    """Until there is no process of that number."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=60)


def test_signals_and_ends(tmp_path, server):
    fork_server.ensure(server)
    process = start(tmp_path, server, 1)
    seen(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 3
    process.send_signal(signal.SIGTERM)  # nobody's any more

    abandoned = start(tmp_path, server, 1)
    while abandoned.pid is None:
        abandoned.poll()
    abandoned.connection.close()  # as the kernel does when the launcher dies
    wait_for_end(abandoned.pid)

    orphan = start(tmp_path, server, 1)
    while orphan.pid is None:
        orphan.poll()
    (first,) = fork_server._servers
    first.process.kill()
    assert ended(orphan) == -signal.SIGKILL
    wait_for_end(orphan.pid)
    assert start(tmp_path, server) is None
    first.process.wait()
    fork_server.ensure(server)
    assert ended(start(tmp_path, server)) == 0


def test_a_signal_while_the_server_imports(tmp_path, server):
    env = server | {"IMPORTS_S": "2"}
    fork_server.ensure(env)
    stopped, process = (start(tmp_path, env, rank) for rank in (1, 0))
    stopped.send_signal(signal.SIGUSR1)
    assert stopped.poll() is None
    stopped.send_signal(signal.SIGTERM)
    assert stopped.returncode == -signal.SIGTERM
    assert ended(process) == 0


def test_another_environment_is_another_servers(tmp_path, server):
    fork_server.ensure(server)
    assert start(tmp_path, server | {"OMP_NUM_THREADS": "64"}) is None
    for threads in range(64, 64 + fork_server.KEPT):
        fork_server.ensure(server | {"OMP_NUM_THREADS": str(threads)})
    assert len(fork_server._servers) == fork_server.KEPT
    assert start(tmp_path, server) is None
    assert ended(start(tmp_path, server | {"OMP_NUM_THREADS": "64"})) == 0
