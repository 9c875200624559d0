"""One trial in a process of its own."""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.config import frozen, yaml_file
from posttrain.config.containers import as_dict
from posttrain.config.trial_names import difference, flatten
from posttrain.errors import RunFailed, UserError
from posttrain.launch.failure import describe_exit
from posttrain.launch.launcher import last_loss
from posttrain.launch.rank_process import base_environment
from posttrain.launch.signals import nohup
from posttrain.report.comparison import format_value
from posttrain.spec import checks, inputs
from posttrain.sweep import log_stderr
from posttrain.train.console import report_to
from posttrain.utils import rundir
from posttrain.utils.gpus import visible_gpus

CONSOLE = "logs/console.log"  # in a trial's directory: what it prints


@dataclass
class Share:
    """The part of this machine that a trial may use.

    Attributes:
        gpus: entries for CUDA_VISIBLE_DEVICES; None: leave it as it is.
        cores: CPU cores it may run on.
    """

    gpus: list[str] | None
    cores: set[int]


def name_for_inputs(sweep_dir: Path, name: str, now: dict[str, str]) -> str:
    """The name of a trial that reads `now`: `name`, with a digest where the trial of that name has read something else.

    Args:
        sweep_dir: of the sweep.
        name: of its values.
        now: see posttrain.spec.inputs.
    """
    before = rundir.object_if_any(sweep_dir / name, inputs.FILE)
    names = inputs.changed(before, now)
    if not names:
        return name
    other = f"{name},inputs={inputs.short(now)}"
    log_stderr(f"{name}: was made with other {' and '.join(names)}; with those of now it is {other}")
    return other


def _decided_there(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What a trial's frozen configuration says of the keys that its machine was left to decide.

    Args:
        before: the frozen configuration, flat.
        now: as it is composed.
    """
    left = []
    if now.get("parallelism.auto"):
        left.append("parallelism.")
        if now.get("trainer.recompute") == "auto":
            left.append("trainer.recompute")  # and of how many layers
            if now.get("trainer.offload_layers") is None:
                left.append("trainer.offload_layers")
    if now.get("trainer.micro_batch_size") == "auto":
        left.append("trainer.micro_batch_size")
    return {key: value for key, value in before.items() if key.startswith(tuple(left))}


@dataclass
class Trial:
    """One point of a grid.

    Attributes:
        name: its folder's name.
        directory: its run directory.
        config: its composed configuration, with `hydra`.
        value: the validation loss that it returned.
        error: why it has none; empty if it has.
        stopped: whether a signal stopped it.
    """

    name: str
    directory: Path
    config: DictConfig
    value: float | None = None
    error: str = ""
    stopped: bool = False
    _process: ForkProcess | None = field(init=False, default=None, repr=False)
    _pipe: Connection | None = field(init=False, default=None, repr=False)

    def already_finished(self) -> bool:
        """Whether its directory holds the finished run of this very configuration, whose value is then taken.

        A pruned trial has finished as long as trials are pruned; without pruning it is resumed.

        Raises:
            UserError: the directory was made with another configuration.
        """
        if not self.directory.is_dir():
            return False
        rundir.check(self.directory)
        if not all(rundir.is_file(self.directory, name) for name in ("config.yaml", "status.json")):
            return False
        file = self.directory / "config.yaml"
        old = yaml_file.parse_text(rundir.read_text(self.directory, file.name), file)
        if not isinstance(old, dict):
            raise UserError(f"{file}: not a configuration: its outermost level must be a mapping")
        before = flatten(frozen.unescaped(old))
        now = flatten(self.task_config())
        changed = difference(before, now | _decided_there(before, now))
        if changed:
            raise UserError(
                f"{self.directory}: this trial was made with other settings ({'; '.join(changed[:5])}); "
                "choose another sweep.name, or remove the directory"
            )
        state = rundir.read_object(self.directory, "status.json").get("state")
        if state != "finished" and not (state == "pruned" and self.config.sweep.pruner):
            return False
        self.value = last_loss(self.directory)
        return True

    def outcome(self) -> str:
        """How it went, in a line."""
        if self.error:
            return self.error.splitlines()[0]
        status = rundir.read_object(self.directory, "status.json")
        if status.get("state") == "pruned":
            return str(status.get("error"))
        if self.value is None:
            return "finished"
        loss = f"validation loss {format_value(self.value)}"
        if status.get("stopped_early"):
            return f"{loss}, {status['stopped_early']}"
        return loss

    def task_config(self) -> dict[str, Any]:
        """The resolved configuration as the run freezes it."""
        config = self.config.copy()
        OmegaConf.set_struct(config, False)
        config.pop("hydra", None)
        return as_dict(config)

    def rank_environment(self, share: Share) -> dict[str, str]:
        """What its ranks have in common in their environment, with what it may use."""
        gpus = visible_gpus() if share.gpus is None else len(share.gpus)
        local_size = checks.nproc_per_node(self.config, gpus)
        deterministic, fsdp = self.config.trainer.deterministic, bool(self.config.parallelism.fsdp)
        return base_environment(gpus, local_size, deterministic, fsdp, len(share.cores))

    def start(self, run: Callable[[DictConfig], Any], share: Share, watcher: int) -> int:
        """Run it in a forked process, which composes and imports nothing again and prints to its CONSOLE.

        Args:
            run: runs the job of a configuration and returns Hydra's JobReturn.
            share: what it may use.
            watcher: descriptor by which it reports (see `console.report_to`); closed here.

        Returns:
            A handle for multiprocessing.connection.wait, ready when the process has ended.
        """
        receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")  # safe here: this process has no threads and no torch
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = context.Process(target=self._child, args=(run, share, watcher, sender), name=self.name)
        self._process.start()
        sender.close()
        os.close(watcher)
        self._pipe = receiver
        return self._process.sentinel

    def send_signal(self, number: int) -> None:
        """Send a signal to the process of a started trial."""
        assert self._process is not None and self._process.pid is not None
        os.kill(self._process.pid, number)

    def _child(self, run: Callable[[DictConfig], Any], share: Share, watcher: int, pipe: Connection) -> None:
        os.setsid()  # Ctrl-C reaches the sweep alone, which passes it on once
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop, saving, if the sweep is killed
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not nohup():
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if share.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
        os.sched_setaffinity(0, share.cores)
        self.directory.mkdir(parents=True, exist_ok=True)
        rundir.make(self.directory, "logs")
        file = rundir.append(self.directory, CONSOLE)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        report_to(watcher)
        try:
            job = run(self.config)
            if isinstance(job._return_value, Exception):  # its property would print Hydra's words first
                raise job._return_value
            answer: dict[str, object] = {"value": job.return_value}
        except (UserError, RunFailed) as error:
            answer = {"error": str(error), "stopped": isinstance(error, RunFailed) and error.stopped}
        except KeyboardInterrupt:
            answer = {"error": "interrupted", "stopped": True}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        pipe.send(json.dumps(answer))

    def finish(self) -> None:
        """Take the answer of the process, which has ended; leave a status.json that says how it went."""
        assert self._process is not None and self._pipe is not None
        self._process.join()
        try:
            answer = json.loads(self._pipe.recv())
        except EOFError:
            answer = {"error": describe_exit(self._process.exitcode or 0)}
        self._pipe.close()
        self.value = answer.get("value")
        self.error = answer.get("error", "")
        self.stopped = answer.get("stopped", False)
        if self.error:
            self.record_failure()

    def record_command(self) -> None:
        """What Hydra records of a trial that it runs itself: the overrides, and its settings."""
        rundir.make(self.directory, ".hydra")
        overrides = OmegaConf.to_yaml(self.config.hydra.overrides.task)
        rundir.write_text(self.directory, ".hydra/overrides.yaml", overrides)
        settings = OmegaConf.to_yaml(OmegaConf.masked_copy(self.config, "hydra"))
        rundir.write_text(self.directory, ".hydra/hydra.yaml", settings)

    def record_failure(self) -> None:
        """A trial that failed before or without its run's own record, in the form of such a record."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if rundir.object_if_any(self.directory, "status.json").get("state") in ("failed", "stopped"):
            return
        if not rundir.is_file(self.directory, "config.yaml"):
            text = frozen.text(frozen.literal(self.task_config()))
            rundir.write_text(self.directory, "config.yaml", text)
        state = "stopped" if self.stopped else "failed"
        status = {"state": state, "error": self.error, "ended": time.time()}
        rundir.write_json(self.directory, "status.json", status)
