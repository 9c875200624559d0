"""One process that imports for all trials of a sweep: each of their ranks is a fork of it.

A sweep starts it (`ensure`) and keeps one end of a pair of sockets, which the trials' launchers inherit. A launcher
sends its orders and the rank's descriptors (`start_rank`). The server (`serve`, in the worker module) has imported what
a run needs and has done nothing with it: its fork is what a process is that has just imported by itself, and nothing of
a trial can come to another. In the place of a child process the launcher has a connection: the server says through it
how the rank ended, and passes signals on. A launcher that dies closes it, which ends the rank.

CUDA doesn't survive a fork: where an import has opened the driver, the server's children import by themselves.
No torch here.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from posttrain.launch.rank_process import COMPILERS, become_rank, die_with_parent, end_session, start_process
from posttrain.utils import heartbeat
from posttrain.utils.rank_environment import STARTED, UI_FD

OPTION = "--fork-server"  # of posttrain.launch.worker, before a descriptor
KEPT = 2  # servers at once: trials may differ in what an import looks at, as the number of threads
# Variables of a rank that no import looks at; in all others a rank's environment must be the server's.
OWN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",  # the driver's, which a rank opens
    *COMPILERS.values(),
    STARTED,
    UI_FD,
    heartbeat.FD,
)
MOST_BYTES = 1 << 16  # of a message
MOST_DESCRIPTORS = 8  # with a message
DRIVER = Path("/dev/nvidia-uvm")  # CUDA's alone: NVML, which only counts, doesn't open it
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)  # that end a process which is still importing


class Orders(TypedDict):
    """What makes a fork a rank.

    Attributes:
        run_dir: of the run.
        env: its own variables; None: not set.
        inherited: its descriptors as `env` names them.
        cwd: folder to which relative paths belong.
        cores: that it may use.
    """

    run_dir: str
    env: dict[str, str | None]
    inherited: list[int]
    cwd: str
    cores: list[int]


class ForkedRank:
    """A forked rank, to be used as the subprocess.Popen of a started one.

    Args:
        connection: to the server.

    Attributes:
        pid: None: it has not been forked yet.
        returncode: as of Popen.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.setblocking(False)
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(BlockingIOError):
            while self.returncode is None:
                self._receive()
        return self.returncode

    def _receive(self) -> None:
        try:
            message = self.connection.recv(MOST_BYTES)
        except ConnectionError:
            message = b""
        if not message:  # the server has been killed, which kills its children
            self._end(-signal.SIGKILL)
        elif self.pid is None:
            self.pid = int(message)
        else:
            self._end(int(message))

    def send_signal(self, number: int) -> None:
        """Send it a signal. As long as its server imports, one that would end an importing process ends it."""
        if self.poll() is not None:
            return
        if self.pid is not None:
            with contextlib.suppress(OSError):  # it ends just now
                self.connection.send(str(int(number)).encode())
        elif number in ENDING:
            self._end(-number)

    def _end(self, code: int) -> None:
        self.returncode = code
        self.connection.close()


class ForkServer:
    """The server of ranks that have an environment in common, started on construction.

    Args:
        env: of one of them.

    Attributes:
        process: the server's.
        common: the environment without OWN.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.common = _common(env)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as output:  # each rank copies it to its log
            arguments = [OPTION, str(theirs.fileno())]
            # It may outlive the sweep: a trial whose sweep was killed saves first.
            self.process = start_process(
                arguments, env, subprocess.DEVNULL, output, [theirs.fileno()], dies_with_parent=False
            )

    def start_rank(self, orders: Orders, log: int) -> ForkedRank | None:
        """Have a rank forked; None where the server has ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = [theirs.fileno(), log, *orders["inherited"]]
        with theirs:
            try:
                socket.send_fds(self.control, [json.dumps(orders).encode()], descriptors)
            except OSError:
                ours.close()
                return None
        return ForkedRank(ours)

    def close(self) -> None:
        """Let it end when the last trial that may use it has ended."""
        self.control.close()


_servers: list[ForkServer] = []  # of this process, or of the one that it was forked from; the latest last


def ensure(env: Mapping[str, str]) -> None:
    """Have a server of ranks with the environment `env`, now and for later trials."""
    for server in list(_servers):
        if server.process.poll() is not None:
            _servers.remove(server)
    if _server_for(env) is None:
        _servers.append(ForkServer(env))
    for server in _servers[:-KEPT]:
        _servers.remove(server)
        server.close()


def start_rank(run_dir: Path, log: int, env: Mapping[str, str], inherited: Sequence[int]) -> ForkedRank | None:
    """Fork a rank of the run in `run_dir`; None where no server has its environment.

    Args:
        run_dir: of the run.
        log: file for what it prints.
        env: its whole environment.
        inherited: descriptors that it keeps, as `env` names them.
    """
    server = _server_for(env)
    if server is None:
        return None
    orders: Orders = {
        "run_dir": str(run_dir),
        "env": {name: env.get(name) for name in OWN},
        "inherited": list(inherited),
        "cwd": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    return server.start_rank(orders, log)


def _server_for(env: Mapping[str, str]) -> ForkServer | None:
    common = _common(env)
    return next((server for server in _servers if server.common == common), None)


def _common(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in OWN}


class Child:
    """A rank as its server sees it.

    Args:
        pid: its process.
        connection: descriptor of the connection to its launcher.
    """

    def __init__(self, pid: int, connection: int) -> None:
        self.pid = pid
        self.connection = connection
        self.end = os.pidfd_open(pid)  # readable when it has ended
        self.abandoned = False
        self.tell(pid)

    def watched(self) -> list[int]:
        """Descriptors that become readable when there is something to do."""
        return [self.end] if self.abandoned else [self.end, self.connection]

    def tell(self, number: int) -> None:
        """Tell the launcher its process or its exit code."""
        with contextlib.suppress(OSError):  # the launcher has died
            os.write(self.connection, str(number).encode())

    def pass_signal(self) -> None:
        """Pass on the signal that the launcher has sent; without a launcher the rank ends."""
        message = os.read(self.connection, MOST_BYTES)
        self.abandoned = not message
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, int(message or signal.SIGKILL))
        if self.abandoned:
            end_session(self.pid)

    def close(self) -> None:
        """Forget it."""
        os.close(self.end)
        os.close(self.connection)


def serve(descriptor: int) -> str:
    """Fork ranks until no launcher is left; returns in each of them, with its run directory.

    Args:
        descriptor: the other end of ForkServer.control.
    """
    children: list[Child] = []
    with socket.socket(fileno=descriptor) as control:
        while True:
            watched = [descriptor]
            for child in children:
                watched += child.watched()
            ready, _, _ = select.select(watched, [], [])
            for child in list(children):
                if child.end in ready:
                    _, status = os.waitpid(child.pid, 0)
                    child.tell(os.waitstatus_to_exitcode(status))
                    child.close()
                    children.remove(child)
                elif child.connection in ready:
                    child.pass_signal()
            if descriptor not in ready:
                continue
            message, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, MOST_DESCRIPTORS)
            if not message:
                os._exit(0)
            connection, *own = descriptors
            sys.stdout.flush()
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                os.close(connection)
                for child in children:
                    child.close()
                control.close()
                return _become(json.loads(message), server, *own)
            for own_descriptor in own:
                os.close(own_descriptor)
            children.append(Child(pid, connection))


def _become(orders: Orders, server: int, log: int, *inherited: int) -> str:
    """Make this fork of the process `server` the rank that the orders say; returns its run directory."""
    os.setsid()
    die_with_parent(server)
    os.chdir(orders["cwd"])
    os.sched_setaffinity(0, orders["cores"])
    here = dict(zip(map(str, orders["inherited"]), map(str, inherited), strict=True))
    env = dict(orders["env"])
    for name in (heartbeat.FD, UI_FD):
        env[name] = here.get(env[name] or "")
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    become_rank(env, log)
    if any(Path(f"/proc/self/fd/{name}").resolve() == DRIVER for name in os.listdir("/proc/self/fd")):
        os.execv(sys.executable, [sys.executable, "-m", "posttrain.launch.worker", orders["run_dir"]])
    return orders["run_dir"]
