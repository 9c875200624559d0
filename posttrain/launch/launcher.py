"""Start a run's processes on this machine, watch them, and say what went wrong.

Every rank is a fresh process, since Megatron's state is process-global: `python -m posttrain.launch.worker RUN_DIR`,
with torch's usual environment (RANK, WORLD_SIZE, ...). A rank writes to RUN_DIR/logs/rankN.log; rank 0 also draws
on the terminal through an inherited file descriptor. No torch here.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint import resume
from posttrain.config import frozen
from posttrain.errors import Pruned, RunFailed, UserError
from posttrain.launch import nodes, prestart
from posttrain.launch.signals import Relay, stopped
from posttrain.spec import checks
from posttrain.train import rollback
from posttrain.utils import heartbeat, rundir
from posttrain.utils.escape import visible
from posttrain.utils.gpus import visible_gpus
from posttrain.utils.heartbeat import Monitor
from posttrain.utils.rank_environment import DEVICE, STARTED, UI_FD

ERROR_FILE = re.compile(r"rank\d+\.error\.json")
STACKS_S = 2.0  # for hanging ranks to write where they are
GRACE_S = 30.0  # for ranks to end by themselves after a signal or after another rank died


def process_start() -> float:
    """When this process was started, seconds since the epoch: before its imports."""
    import psutil

    return psutil.Process().create_time()


def start_early(words: list[str]) -> None:
    """Start the first local rank's process now, where the command line `words` is that of one run."""
    gpus = visible_gpus()
    if not prestart.wanted(words, gpus):
        return
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **device_environment(gpus), **platform_environment(gpus, 1)}
    command = [sys.executable, "-m", "posttrain.launch.worker"]
    _prestarted.append(prestart.PrestartedRank(command, env, UI_FD, _die_with_parent))


_prestarted: list[prestart.PrestartedRank] = []


def device_environment(gpus: int) -> dict[str, str]:
    """What tells a rank where to compute."""
    return {DEVICE: "cuda" if gpus else "cpu"}


def reserve_port() -> socket.socket:
    """A TCP port that the system gives to nobody else while the returned socket is open, and on which a child listens.

    Seconds pass until a rank does. Linux lets it (both have SO_REUSEADDR, this one doesn't listen), and keeps such a
    port from outgoing connections and from those who ask for any port.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def prepare(cfg: DictConfig, run_dir: Path) -> Path:
    """Write the frozen configuration that every rank reads; return its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rundir.make(run_dir, "logs")
    # Every machine of a run writes the same text, whichever comes last.
    text = frozen.text(OmegaConf.merge(cfg, {"launch": {"node_rank": 0}}))
    rundir.write_text(run_dir, "config.yaml", text)
    return run_dir / "config.yaml"


def launch(cfg: DictConfig, run_dir: Path, gpus: int) -> float | None:
    """Train in `run_dir` with this machine's share of the processes.

    Returns:
        The last validation loss, or None where there was no validation.

    Raises:
        UserError: a rank found a mistake of the user's.
        RunFailed: a rank died; the message names it, its error and its log.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with Relay() as relay:
        lock_run(run_dir, nodes.first(cfg))
        rundir.check(run_dir)
        if nodes.first(cfg):
            rundir.sweep(run_dir, lone=cfg.launch.nnodes == 1 and not nodes.torchrun())
        nodes.check_port(cfg)
        if nodes.first(cfg):
            resume.check(cfg, run_dir)
        prepare(cfg, run_dir)
        started = time.time()
        record(cfg, run_dir, {"state": "running", "started": started, "pid": os.getpid()})
        status: dict[str, Any] = {"state": "failed"}
        try:
            _run(cfg, run_dir, gpus, relay)
            status = {"state": "finished"}
        except Pruned as error:
            status = {"state": "pruned", "error": str(error)}
        except (UserError, RunFailed) as error:
            state = "stopped" if getattr(error, "stopped", False) else "failed"
            status = {"state": state, "error": str(error), "exit_code": error.exit_code}
            raise
        finally:
            # Where something has been raised, a disk that refuses this too changes nothing about it.
            failed = status["state"] in ("failed", "stopped")
            with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                record(cfg, run_dir, {**status, "started": started, "ended": time.time()})
    return last_loss(run_dir)


def _run(cfg: DictConfig, run_dir: Path, gpus: int, relay: Relay) -> None:
    """Start the ranks and wait for them, again as often as launch.max_restarts and their rollbacks say."""
    restarts = 0
    while True:
        try:
            return NodeRun(cfg, run_dir, gpus, relay).wait()
        except RunFailed as error:
            if relay.run.told_late:
                raise
            if error.rolled_back:  # as often as trainer.max_rollbacks says; the ranks count
                print(f"posttrain: {visible(str(error))}", file=sys.stderr)
                continue
            if restarts == cfg.launch.max_restarts or not error.restartable:
                raise
            restarts += 1
            print(f"posttrain: {error}\nposttrain: starting again from the newest checkpoint", file=sys.stderr)


def last_loss(run_dir: Path) -> float | None:
    """The validation loss that a finished or pruned run has left, if it has one."""
    if not rundir.is_file(run_dir, "summary.json"):
        return None
    loss = rundir.read_object(run_dir, "summary.json").get("val_loss_after")
    return loss if isinstance(loss, float) else None


def record(cfg: DictConfig, run_dir: Path, status: dict[str, Any]) -> None:
    """Write status.json, which is the first process's to write where several machines share the directory."""
    if nodes.first(cfg):
        went_back = [{key: one[key] for key in ("step", "to", "why")} for one in rollback.read(run_dir)]
        rundir.write_json(run_dir, "status.json", {**status, "rollbacks": went_back} if went_back else status)


def lock_run(run_dir: Path, first: bool = True) -> None:
    """Refuse a run directory in which another run is training; `first` is whether this command starts rank 0.

    The lock is the kernel's (flock), so it goes with the process however that ends.
    """
    import fcntl

    if not first:  # the other machines of a run that rank 0's command has locked
        return
    handle = os.fdopen(rundir.lock_file(run_dir, ".lock"), "wb")  # held until this process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"hydra.run.dir={run_dir}: another run is using this directory; choose another") from None
    _locks.append(handle)


_locks: list[Any] = []


@dataclass
class NodeRun:
    """The processes of one run on one machine, started on construction.

    Args:
        cfg: the checked configuration.
        run_dir: where logs and errors go.
        gpus: visible GPUs; 0 means the CPU.
        relay: brings the signals of this command.
    """

    cfg: DictConfig
    run_dir: Path
    gpus: int
    relay: Relay
    processes: list[subprocess.Popen] = field(default_factory=list)
    monitors: list[Monitor] = field(default_factory=list)
    hung: str | None = None  # what hung, in words
    signals: list[int] = field(default_factory=list)
    signalled: float = 0.0  # when the first signal came, seconds since the epoch
    told_late: bool = False  # a signal came when all had ended

    def __post_init__(self) -> None:
        before, self.relay.run = self.relay.run, self
        if before and before.told_late:  # between two starts
            self.signals.append(signal.SIGTERM)
        launch, local = self.cfg.launch, checks.nproc_per_node(self.cfg, self.gpus)
        self.port = reserve_port()
        port = launch.master_port or self.port.getsockname()[1]
        ranks = {local_rank: launch.node_rank * local + local_rank for local_rank in nodes.local_ranks(local)}
        self.ranks = list(ranks.values())
        # The first command clears all; another machine's own, since it may start later than the first has failed.
        stale = error_files(self.run_dir) if nodes.first(self.cfg) else [error_file(rank) for rank in self.ranks]
        for name in stale:
            rundir.remove(self.run_dir, name)
        ui = os.dup(1)
        try:
            for local_rank, rank in ranks.items():
                env = {
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(local_rank),
                    "WORLD_SIZE": str(local * launch.nnodes),
                    "LOCAL_WORLD_SIZE": str(local),
                    "MASTER_ADDR": launch.master_addr,
                    "MASTER_PORT": str(port),
                    "PYTHONUNBUFFERED": "1",
                    **device_environment(self.gpus),
                    STARTED: repr(process_start()),
                    **platform_environment(self.gpus, local, self.cfg.trainer.deterministic),
                }
                log_name = f"logs/rank{rank}.log"
                if local_rank == 0 and self._started_early(rank, local, env, log_name):
                    continue
                if rank == 0:
                    env[UI_FD] = str(ui)
                monitor = Monitor(rank)
                self.monitors.append(monitor)
                env[heartbeat.FD] = str(monitor.inherited)
                log = rundir.append(self.run_dir, log_name)  # the child's from here
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "posttrain.launch.worker", str(self.run_dir)],
                        env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        pass_fds=(monitor.inherited, *([ui] if rank == 0 else [])),
                        start_new_session=True,  # Ctrl-C reaches this process alone, which then decides
                        preexec_fn=_die_with_parent,
                    )
                )  # fmt: skip
                os.close(log)
                monitor.started()
        finally:
            os.close(ui)
        if self.signals:
            self._send(signal.SIGTERM)  # to those that had not been started when it came

    def _started_early(self, rank: int, local: int, env: dict[str, str], log: str) -> bool:
        """Whether a process that waits became this rank; its environment is a lone rank's, without determinism."""
        if not _prestarted:
            return False
        waiting = _prestarted.pop()
        other = (not self.gpus and local > 1) or self.cfg.trainer.deterministic
        if other or not waiting.give(rank, self.run_dir, log, env):
            waiting.end()
            return False
        self.processes.append(waiting.process)
        self.monitors.append(waiting.monitor)
        return True

    def wait(self) -> None:
        """Until every rank has ended; on a signal or a death, end the others.

        Raises:
            UserError, RunFailed: see `launch`.
        """
        try:
            deadline = None
            while any(process.poll() is None for process in self.processes):
                bad = any(process.poll() not in (None, 0) for process in self.processes)
                if deadline is None and bad:
                    deadline = time.monotonic() + GRACE_S
                    time.sleep(1.0)  # a rank that fails in a collective fails on all ranks: let them say so
                    self._note_deaths()
                    self._send(signal.SIGTERM)
                if deadline is None and self._hangs():
                    self._send(signal.SIGUSR1)  # each writes its stacks to its log (worker.py)
                    deadline = time.monotonic() + STACKS_S
                if deadline is not None and time.monotonic() > deadline:
                    self._send(signal.SIGKILL)
                time.sleep(0.05)
        except BaseException:
            self._send(signal.SIGKILL)
            raise
        finally:
            self.port.close()
            for monitor in self.monitors:
                monitor.close()
            for process in self.processes:  # loader workers that a rank has left, in its session
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        codes = [process.returncode for process in self.processes]
        if any(codes):
            if deadline is None:
                self._note_deaths()
            if self.cfg.launch.nnodes > 1:
                time.sleep(1.0)  # other machines' commands leave their word as well
            raise self._failure(codes)

    def _hangs(self) -> bool:
        """Whether a rank has given no sign of life for longer than launch.timeout_s; the others may wait for it."""
        limit = self.cfg.launch.timeout_s
        late = [monitor.rank for monitor in self.monitors if monitor.silent_for() > limit]
        if late:
            ranks = f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
            self.hung = f"no progress for launch.timeout_s={limit:g} seconds in a step, validation or save of {ranks}"
        return bool(late)

    def on_signal(self, number: int) -> None:
        """First signal: ranks finish the step, save and leave. A second SIGINT: stop at once."""
        if self.processes and all(process.poll() is not None for process in self.processes):
            self.told_late = True
            return
        again = number == signal.SIGINT and signal.SIGINT in self.signals
        self.signalled = self.signalled or time.time()
        self.signals.append(number)
        self._send(signal.SIGKILL if again else signal.SIGTERM)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _failure(self, codes: list[int]) -> Exception:
        """The error of the rank that failed first, in words."""
        if self.hung:
            return RunFailed(f"{self.hung}; where each rank was is at the end of {self.run_dir / 'logs' / 'rank*.log'}")
        found = [rundir.read_json(self.run_dir, name) for name in error_files(self.run_dir)]
        # A rank that was killed explains the others' lost connections, which they may have noticed before.
        first = min(found, key=lambda e: (not e.get("killed"), e["time"]), default=None)
        if first and first["user_error"]:
            return UserError(first["message"])
        if first and first.get("rolled_back") and not self.signals:
            error = RunFailed(first["message"])
            error.rolled_back = True
            return error
        saved = all(code in (0, RunFailed.STOPPED) for code in codes)
        if first and first.get("pruned") and saved and not self.signals:
            return Pruned(first["message"])
        failed_before = first and self.signals and first["time"] < self.signalled  # another machine's rank
        if (self.signals and not failed_before) or saved:
            by = "{}" if self.signals else "a signal to another of its commands"
            trial = (self.run_dir.parent / "multirun.yaml").exists()  # of a grid, whose command knows its directories
            words = "the same command" if trial else f"the same command with hydra.run.dir={self.run_dir}"
            again = f" after saving; {words} resumes it" if saved else ""
            return stopped((self.signals or [signal.SIGTERM])[0], f"stopped by {by}{again}")
        if first:
            where = self.run_dir / "logs" / f"rank{first['rank']}.log"
            failed = "" if first.get("killed") else "failed: "
            return RunFailed(f"rank {first['rank']} {failed}{first['message']}\n  log: {where}")
        index, code = next((i, c) for i, c in enumerate(codes) if c)
        rank = self.ranks[index]
        return RunFailed(f"rank {rank} {_death(code)}\n  log: {self.run_dir / 'logs' / f'rank{rank}.log'}")

    def _note_deaths(self) -> None:
        """Leave word of ranks that were killed, for which nobody else can: other machines of the run read it too."""
        for rank, process in zip(self.ranks, self.processes, strict=True):
            if (process.poll() or 0) < 0 and not self.signals:
                death = {"rank": rank, "time": time.time(), "user_error": False, "killed": True}
                rundir.write_json(self.run_dir, error_file(rank), {**death, "message": _death(process.returncode)})


def error_file(rank: int) -> str:
    """In a run directory: how a rank ended that ended badly."""
    return f"logs/rank{rank}.error.json"


def error_files(run_dir: Path) -> list[str]:
    """Those of all ranks that ended badly."""
    return [f"logs/{name}" for name in rundir.names(run_dir, "logs") if ERROR_FILE.fullmatch(name)]


def _death(code: int) -> str:
    """How a process ended, by its exit code."""
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return died + (" (out of memory?)" if code == -signal.SIGKILL else "")


def platform_environment(gpus: int, local: int, deterministic: bool = False) -> dict[str, str]:
    """Variables that must be set before torch is imported; the user's own values win."""
    wanted = {"TOKENIZERS_PARALLELISM": "true"}
    if gpus:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's overlap relies on the order of kernel launches
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        wanted["NVTE_FRAMEWORK"] = "pytorch"
        if deterministic:  # what torch, Transformer Engine and Megatron ask for
            wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            wanted["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
            wanted["NCCL_ALGO"] = "Ring"
    else:
        wanted["CUDA_VISIBLE_DEVICES"] = ""
        wanted["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser compiles with torch.compile
        wanted["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads that spin take the cores from everything else
        wanted["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // local))
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _die_with_parent() -> None:
    """In the child, before exec: be killed when this process dies, however it dies (Linux PR_SET_PDEATHSIG).

    Slurm sends a job's signal to every process of it; what it means to a rank is the command's to say, by SIGTERM.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
