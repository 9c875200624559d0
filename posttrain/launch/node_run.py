"""The ranks of a run on one machine: started, watched for deaths and hangs, ended together."""

import os
import signal
import subprocess
import time
from pathlib import Path

from omegaconf import DictConfig

from posttrain.errors import RunFailed
from posttrain.launch import failure, fork_server, nodes, prestart
from posttrain.launch.rank_process import (
    COMPILERS,
    RankProcess,
    base_environment,
    end_session,
    kernel_cache,
    start_process,
)
from posttrain.launch.signals import SignalRelay
from posttrain.spec import checks
from posttrain.train.console import Screen, ScreenPipe
from posttrain.utils import boot_clock, heartbeat, rundir
from posttrain.utils.heartbeat import Monitor
from posttrain.utils.rank_environment import STARTED, UI_FD

STACKS_S = 2.0  # for hanging ranks to write where they are
GRACE_S = 30.0  # for ranks to end by themselves after a signal or after another rank died
ERRORS_S = 1.0  # for ranks that fail together, as in a collective, to write their errors
POLL_S = 0.05


class NodeRun:
    """The processes of one run on one machine, started on construction.

    Args:
        cfg: the checked configuration.
        run_dir: where logs and errors go.
        gpus: visible GPUs; 0 means the CPU.
        relay: brings the signals of this command.

    Attributes:
        processes, monitors: one for each of `ranks`.
        screen: of this command.
        drawing: what the first rank sends to be drawn; None: it is on another machine.
        hang: what hangs, in words.
        signals: received.
        signalled_at: when the first came, seconds since the epoch, as errors of ranks on all machines are timed; 0.0:
            none came.
        signalled_after_end: whether a signal came when all ranks had ended.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path, gpus: int, relay: SignalRelay) -> None:
        self.cfg = cfg
        self.run_dir = run_dir
        self.gpus = gpus
        self.processes: list[RankProcess] = []
        self.monitors: list[Monitor] = []
        self.screen = Screen.of_command()
        self.drawing: ScreenPipe | None = None
        self.told = False  # on the terminal that Ctrl-C has been seen
        self.hang: str | None = None
        self.signals: list[int] = []
        self.signalled_at = 0.0
        self.signalled_after_end = False
        previous = relay.run
        relay.run = self
        if previous is not None and previous.signalled_after_end:  # between two starts
            self.signals.append(signal.SIGTERM)
        self.local_size = checks.nproc_per_node(cfg, gpus)
        self.local_ranks = nodes.local_ranks(self.local_size)
        self.ranks = [cfg.launch.node_rank * self.local_size + local_rank for local_rank in self.local_ranks]
        self.port = nodes.reserve_port()
        self._remove_old_errors()
        self._start()

    def _remove_old_errors(self) -> None:
        """The first command removes all; another machine's its own, since it may start after the first has failed."""
        names = [failure.error_file(rank) for rank in self.ranks]
        if nodes.first(self.cfg):
            names = failure.error_files(self.run_dir)
        for name in names:
            rundir.remove(self.run_dir, name)

    def _start(self) -> None:
        for rank, local_rank in zip(self.ranks, self.local_ranks, strict=True):
            self._start_rank(rank, local_rank)
        prestart.end_unused()
        if self.drawing:
            self.screen.phase("importing")
        if self.signals:
            self._send(signal.SIGTERM)  # to those that had not been started when it came

    def _start_rank(self, rank: int, local_rank: int) -> None:
        """Start one rank; rank 0 says through an inherited descriptor what is drawn on the terminal."""
        env = self._environment(rank, local_rank)
        log_name = f"logs/rank{rank}.log"
        if self._use_prestarted(rank, local_rank, env, log_name):
            return
        monitor = Monitor(rank)
        self.monitors.append(monitor)
        env[heartbeat.FD] = str(monitor.inherited)
        inherited = [monitor.inherited]
        if rank == 0:
            self.drawing = ScreenPipe()
            env[UI_FD] = str(self.drawing.inherited)
            inherited.append(self.drawing.inherited)
        log = rundir.append(self.run_dir, log_name)  # the child's from here
        process: RankProcess | None = fork_server.start_rank(self.run_dir, log, env, inherited)
        if process is None:
            process = start_process([str(self.run_dir)], env, subprocess.DEVNULL, log, inherited)
        self.processes.append(process)
        os.close(log)
        monitor.started()
        if rank == 0 and self.drawing:
            self.drawing.started()

    def _environment(self, rank: int, local_rank: int) -> dict[str, str]:
        """A rank's environment, with the variables that torch reads."""
        launch = self.cfg.launch
        port = launch.master_port or self.port.getsockname()[1]
        fsdp = bool(self.cfg.parallelism.fsdp)
        env = base_environment(self.gpus, self.local_size, self.cfg.trainer.deterministic, fsdp)
        if self.gpus:
            for compiler, variable in COMPILERS.items():
                env.setdefault(variable, str(kernel_cache(self.cfg.cache_dir, compiler)))
        return {
            **env,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.local_size * launch.nnodes),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": launch.master_addr,
            "MASTER_PORT": str(port),
            STARTED: repr(boot_clock.process_start()),
        }

    def _use_prestarted(self, rank: int, local_rank: int, env: dict[str, str], log: str) -> bool:
        """Whether a pre-started process became this rank; its environment is that of a run without special needs."""
        prestarted = prestart.take(local_rank)
        if prestarted is None:
            return False
        other_cores = not self.gpus and self.local_size != prestarted.local_size
        fits = not (other_cores or self.cfg.trainer.deterministic or self.cfg.parallelism.fsdp)
        if not fits or not prestarted.assign(rank, self.run_dir, log, env):
            prestarted.end()
            return False
        self.processes.append(prestarted.process)
        self.monitors.append(prestarted.monitor)
        if prestarted.drawing:
            self.drawing = prestarted.drawing
        return True

    def wait(self) -> None:
        """Wait until every rank has ended; on a signal or a death, end the others.

        Raises:
            UserError, RunFailed: see `launcher.launch`.
        """
        try:
            deaths_recorded = self._watch()
        except BaseException:
            self._send(signal.SIGKILL)
            raise
        finally:
            self._close()
        codes = {rank: process.returncode for rank, process in zip(self.ranks, self.processes, strict=True)}
        if not any(codes.values()):
            return
        if not deaths_recorded:
            self._record_killed()
        if self.cfg.launch.nnodes > 1:
            time.sleep(ERRORS_S)  # commands on other machines record killed ranks as well
        if self.hang:
            logs = self.run_dir / "logs" / "rank*.log"
            raise RunFailed(f"{self.hang}; where each rank was is at the end of {logs}")
        raise failure.explain(self.run_dir, codes, self.signals, self.signalled_at)

    def _watch(self) -> bool:
        """Wait for all ranks, and end them where one has died or hangs; whether killed ranks have been recorded."""
        deadline: float | None = None
        while any(process.poll() is None for process in self.processes):
            if deadline is None and self._has_failed():
                deadline = time.monotonic() + GRACE_S
                time.sleep(ERRORS_S)
                self._record_killed()
                self._send(signal.SIGTERM)
            if deadline is None and self._hangs():
                self._send(signal.SIGUSR1)  # each writes its stacks to its log (worker.py)
                deadline = time.monotonic() + STACKS_S
            if deadline is not None and time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            self._draw()
            time.sleep(POLL_S)
        return deadline is not None

    def _has_failed(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self.processes)

    def _draw(self) -> None:
        """Draw what the first rank has sent, and the time that goes by."""
        if self.drawing:
            self.drawing.show(self.screen)
        if self.signals == [signal.SIGINT] and self.screen.live and not self.told:
            self.told = True
            self.screen.print("stopping; a step under way is finished and saved. Ctrl-C again stops at once")
        self.screen.refresh()

    def _close(self) -> None:
        """Let go of terminal, port and pipes, and kill loader workers that a rank has left in its session."""
        self._draw()
        self.screen.stop()
        if self.drawing:
            self.drawing.close()
        self.port.close()
        for monitor in self.monitors:
            monitor.close()
        for process in self.processes:
            end_session(process.pid)

    def _hangs(self) -> bool:
        """Whether a rank has given no sign of life for longer than launch.timeout_s; the others may wait for it."""
        limit = self.cfg.launch.timeout_s
        silent = [monitor.rank for monitor in self.monitors if monitor.silent_for() > limit]
        if not silent:
            return False
        plural = "s" if len(silent) > 1 else ""
        ranks = f"rank{plural} {', '.join(map(str, silent))}"
        self.hang = f"no progress for launch.timeout_s={limit:g} seconds in a step, validation or save of {ranks}"
        return True

    def on_signal(self, number: int) -> None:
        """First signal: ranks finish the step, save and leave. A second SIGINT: stop at once."""
        if self.processes and all(process.poll() is not None for process in self.processes):
            self.signalled_after_end = True
            return
        at_once = number == signal.SIGINT and signal.SIGINT in self.signals
        if not self.signalled_at:
            self.signalled_at = time.time()
        self.signals.append(number)
        self._send(signal.SIGKILL if at_once else signal.SIGTERM)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _record_killed(self) -> None:
        """Record the ranks that a signal has killed, unless this command was told to stop."""
        if self.signals:
            return
        for rank, process in zip(self.ranks, self.processes, strict=True):
            code = process.poll()
            if code is not None and code < 0:
                failure.record_killed(self.run_dir, rank, code)
