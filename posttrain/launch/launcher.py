"""Start a run's processes on this machine, restart them where that may help, and record how it went.

Every rank is a fresh process, since Megatron's state is process-global: `python -m posttrain.launch.worker RUN_DIR`,
with torch's usual environment (RANK, WORLD_SIZE, ...). A rank writes to RUN_DIR/logs/rankN.log; rank 0 also draws
on the terminal through an inherited file descriptor. No torch here.
"""

import fcntl
import os
import socket
import sys
import time
from io import BufferedWriter
from pathlib import Path

from omegaconf import DictConfig

from posttrain.config import frozen
from posttrain.errors import Pruned, RunFailed, UserError
from posttrain.launch import nodes
from posttrain.launch.node_run import NodeRun
from posttrain.launch.signals import SignalRelay
from posttrain.spec import inputs, resumption
from posttrain.spec.record import FILE as SPEC_FILE
from posttrain.spec.record import format_spec
from posttrain.spec.run_spec import RunSpec
from posttrain.train import rollback
from posttrain.utils import rundir
from posttrain.utils.escape import escape_control


def launch(cfg: DictConfig, run_dir: Path, gpus: int, spec: RunSpec | None = None) -> float | None:
    """Train in `run_dir` with this machine's share of the processes.

    Args:
        cfg: the checked configuration.
        run_dir: where everything is written.
        gpus: visible GPUs; 0 means the CPU.
        spec: the run's specification, to be recorded and shown; None: not known before the model is read.

    Returns:
        The last validation loss, or None where there was no validation.

    Raises:
        UserError: a rank found a mistake of the user's.
        RunFailed: a rank died; the message names it, its error and its log.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with SignalRelay() as relay:
        lock_run(run_dir, nodes.first(cfg))
        rundir.check(run_dir)
        if nodes.first(cfg):
            rundir.sweep(run_dir, lone=cfg.launch.nnodes == 1 and not nodes.torchrun())
        nodes.check_port(cfg)
        if nodes.first(cfg):
            resumption.check(cfg, run_dir)
        prepare(cfg, run_dir)
        if nodes.first(cfg):
            record_inputs(cfg, run_dir)
            print(f"run directory: {escape_control(str(run_dir))}", flush=True)
            record_spec(run_dir, spec)
        started = time.time()
        here = {"pid": os.getpid(), "host": socket.gethostname()}
        record(cfg, run_dir, {"state": "running", "started": started, **here})
        status: dict[str, object] = {"state": "failed"}
        try:
            _run(cfg, run_dir, gpus, relay)
            status = {"state": "finished", **stopped_early(run_dir)}
        except Pruned as error:
            status = {"state": "pruned", "error": str(error)}
        except UserError as error:
            status = {"state": "failed", "error": str(error), "exit_code": error.exit_code}
            raise
        except RunFailed as error:
            state = "stopped" if error.stopped else "failed"
            status = {"state": state, "error": str(error), "exit_code": error.exit_code}
            raise
        finally:
            _record_end(cfg, run_dir, {**status, "started": started, "ended": time.time()})
    return last_loss(run_dir)


def check_place(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse what `launch` would refuse of the directory, before anything in it is changed.

    Hydra records there what a command was given, which is what the run's next command starts from.

    Args:
        cfg: the checked configuration.
        run_dir: where everything is to be written; there may be none yet.

    Raises:
        UserError: another run is using it, or the run in it can't continue with this configuration.
    """
    if run_dir.is_dir():
        rundir.check(run_dir)
        if rundir.is_in_use(run_dir):
            raise _in_use(run_dir)
    resumption.check(cfg, run_dir)


def _run(cfg: DictConfig, run_dir: Path, gpus: int, relay: SignalRelay) -> None:
    """Start the ranks and wait for them, again as often as launch.max_restarts and their rollbacks say."""
    restarts = 0
    while True:
        ranks = NodeRun(cfg, run_dir, gpus, relay)
        try:
            return ranks.wait()
        except RunFailed as error:
            if ranks.signalled_after_end:
                raise
            if error.rolled_back:  # as often as trainer.max_rollbacks says; the ranks count
                print(f"posttrain: {escape_control(str(error))}", file=sys.stderr)
                continue
            if restarts == cfg.launch.max_restarts or not error.restartable:
                raise
            restarts += 1
            print(f"posttrain: {error}\nposttrain: starting again from the newest checkpoint", file=sys.stderr)


def prepare(cfg: DictConfig, run_dir: Path) -> Path:
    """Write the frozen configuration that every rank reads; return its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rundir.make(run_dir, "logs")
    # Every machine of a run writes the same text, whichever comes last.
    shared = cfg.copy()
    shared.launch.node_rank = 0
    text = frozen.text(shared)
    rundir.write_text(run_dir, "config.yaml", text)
    return run_dir / "config.yaml"


def record_inputs(cfg: DictConfig, run_dir: Path) -> None:
    """Write the digests of what the configuration names: rows, template, weights."""
    rundir.write_json(run_dir, inputs.FILE, inputs.digests(cfg))


def record_spec(run_dir: Path, spec: RunSpec | None) -> None:
    """Write spec.yaml; on GPUs, print the decisions that a user may ask about, with the reasons."""
    if spec is None:
        rundir.remove(run_dir, SPEC_FILE)  # of an earlier start
        return
    rundir.write_text(run_dir, SPEC_FILE, format_spec(spec))
    if spec.device == "cuda":
        for name, decision in spec.decisions().items():
            print(f"{name}: {decision}", flush=True)


def last_loss(run_dir: Path) -> float | None:
    """The validation loss that a finished or pruned run has left, if it has one."""
    if not rundir.is_file(run_dir, "summary.json"):
        return None
    loss = rundir.read_object(run_dir, "summary.json").get("val_loss_after")
    return loss if isinstance(loss, float) else None


def stopped_early(run_dir: Path) -> dict[str, object]:
    """The part of the status of a finished run that says why it ended before its last step; empty if it didn't."""
    why = rundir.object_if_any(run_dir, "summary.json").get("stopped_early")
    return {"stopped_early": str(why)} if why else {}


def record(cfg: DictConfig, run_dir: Path, status: dict[str, object]) -> None:
    """Write status.json, which is the first process's to write where several machines share the directory."""
    if not nodes.first(cfg):
        return
    rollbacks = []
    for entry in rollback.read(run_dir):
        rollbacks.append({key: entry[key] for key in ("step", "to", "why")})
    if rollbacks:
        status = {**status, "rollbacks": rollbacks}
    rundir.write_json(run_dir, "status.json", status)


def _record_end(cfg: DictConfig, run_dir: Path, status: dict[str, object]) -> None:
    try:
        record(cfg, run_dir, status)
    except OSError:
        if status["state"] in ("finished", "pruned"):
            raise
        # Else the run's own error is being raised, and a disk that refuses this too changes nothing about it.


_locks: list[BufferedWriter] = []  # held until this process ends


def lock_run(run_dir: Path, first: bool = True) -> None:
    """Refuse a run directory in which another run is training.

    The lock is the kernel's (flock), so it goes with the process however that ends.

    Args:
        run_dir: to lock.
        first: whether this command starts rank 0; the other machines of a run rely on its lock.
    """
    if not first:
        return
    lock = os.fdopen(rundir.lock_file(run_dir, rundir.LOCK), "wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _in_use(run_dir) from None
    _locks.append(lock)


def _in_use(run_dir: Path) -> UserError:
    return UserError(f"hydra.run.dir={run_dir}: another run is using this directory; choose another")
