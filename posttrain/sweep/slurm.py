"""Runs as jobs of a Slurm cluster: submitted through submitit, watched with squeue, judged by their status files."""

import getpass
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from posttrain.config import frozen, policy
from posttrain.config.containers import as_dict
from posttrain.config.schema import SlurmSchema
from posttrain.errors import UserError
from posttrain.launch import launcher, nodes
from posttrain.plan import auto
from posttrain.spec import checks
from posttrain.spec.resolve import AUTO
from posttrain.sweep import log_stderr
from posttrain.sweep.job import AGAIN, SAVE, Job
from posttrain.sweep.trial import Trial
from posttrain.utils import rundir, working
from posttrain.utils.mappings import without_none

if TYPE_CHECKING:
    from submitit import SlurmExecutor

LAUNCHER = "hydra/launcher=slurm"
INSTEAD = "; hydra.launcher.dry_run=true shows the job without it, hydra/launcher=local runs here"
RETRY_S = 10.0  # between questions to a Slurm that doesn't answer
RECORD = "slurm.json"  # in a run directory: which job runs it
WAITS = "waits in the queue"
# Slurm's reasons for which a job whose turn comes waits.
ORDINARY_REASONS = ("None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit")
# Slurm's state of an ended job that recorded nothing itself -> what happened, and what to do about it.
ENDS = {
    "TIMEOUT": "reached its time limit before it could save; hydra.launcher.signal_delay_s may be too short",
    "OUT_OF_MEMORY": "used more memory than it asked for; set hydra.launcher.mem_gb",
    "NODE_FAIL": "lost its node; the same command resumes it",
    "PREEMPTED": "was preempted and not queued again; the same command resumes it",
    "CANCELLED": "was cancelled; the same command resumes it",
    "FAILED": "failed",
}


def with_launcher(argv: list[str]) -> list[str]:
    """The command line, where `launch.submit=true` implies the Slurm launcher unless another is chosen."""
    submit = any(arg.lstrip("+").lower() == "launch.submit=true" for arg in argv)
    has_launcher = any(arg.startswith("hydra/launcher=") for arg in argv)
    if not submit or has_launcher:
        return argv
    return [*argv, LAUNCHER]


def options_of(group: DictConfig) -> SlurmSchema | None:
    """The options of the Slurm launcher in a composed `hydra.launcher`, None if that is another launcher."""
    if group.get("_target_") != SlurmSchema._target_:
        return None
    return SlurmSchema(**as_dict(group))


def _options(trial: Trial) -> SlurmSchema:
    """The options of a trial that the Slurm launcher was asked to run."""
    options = options_of(trial.config.hydra.launcher)
    assert options is not None
    return options


def check_run(cfg: DictConfig, options: SlurmSchema) -> None:
    """What can be known to be wrong with a run before its job waits in a queue.

    Raises:
        UserError: the first thing found wrong.
    """
    cfg = cfg.copy()
    cfg.launch.nnodes = options.nodes
    cfg.launch.node_rank = 0
    cfg.launch.master_port = nodes.PORTS[0]  # the job finds its own
    shape = checks.check_settings(cfg, options.gpus_per_node, elsewhere=True)
    given = cfg.parallelism.nproc_per_node
    if given is not None and 0 < options.gpus_per_node < given:
        raise UserError(
            f"`parallelism.nproc_per_node={given}`: the job asks for hydra.launcher.gpus_per_node="
            f"{options.gpus_per_node}; add hydra.launcher.gpus_per_node={given}"
        )
    setting = None
    if given is None and options.gpus_per_node:
        setting = "hydra.launcher.gpus_per_node"
    count = None
    if not cfg.parallelism.auto:
        count = checks.process_count(cfg, options.gpus_per_node, setting)
    if cfg.parallelism.auto:
        if cfg.parallelism.memory_gib:
            auto.resolve(cfg, options.gpus_per_node, transformer_engine=True)  # as is expected there
        else:  # the job's node knows its GPUs; all else is checked as for one process
            cfg.parallelism.auto = False
            cfg.parallelism.nproc_per_node = 1
            cfg.launch.nnodes = 1
    if cfg.trainer.micro_batch_size == AUTO:
        cfg.trainer.micro_batch_size = 1  # the job's node knows its GPUs' memory
    checks.check_parallelism(cfg, options.gpus_per_node, shape, count)


def require() -> None:
    """See that jobs can be submitted from here.

    Raises:
        UserError: there is no Slurm, or it doesn't answer.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"{LAUNCHER}: there is no Slurm on this machine (no sbatch){INSTEAD}")
    in_queue()


def run_jobs(trials: list[Trial], folder: Path) -> None:
    """Submit what is not in the queue yet and wait for all; their `value` and `error` are filled in.

    Trials whose options Slurm refuses have failed, and the others are submitted.

    Args:
        trials: to run, with their configurations.
        folder: for submitit's scripts.

    Raises:
        UserError: Slurm doesn't answer, or it refuses all jobs.
        KeyboardInterrupt: a signal ended the command. The jobs continue.
    """
    if any(_options(trial).dry_run for trial in trials):
        raise UserError("hydra.launcher.dry_run=true: shows no job of a command with --config-name")
    queue = in_queue()
    waiting: dict[str, Trial] = {}
    refused = None
    fresh: dict[str, list[Trial]] = {}
    for trial in trials:
        job = rundir.object_if_any(trial.directory, RECORD).get("job")
        options = _options(trial)
        if job in queue:
            log_stderr(f"{trial.name}: is already in the queue as job {job}")
            waiting[job] = trial
            continue
        try:
            check_run(_task(trial), options)
        except UserError as error:
            trial.error = str(error)
            trial.record_failure()
            continue
        fresh.setdefault(repr(options), []).append(trial)
    for group in fresh.values():
        try:
            waiting |= submit(group, _options(group[0]), folder)
        except UserError as error:
            refused = error
    if refused and not waiting:
        raise refused
    if waiting:
        wait(waiting, min(_options(trial).poll_s for trial in waiting.values()))


def submit(trials: list[Trial], options: SlurmSchema, folder: Path) -> dict[str, Trial]:
    """Submit trials with the same options, several as one array; returns job id -> trial.

    Raises:
        UserError: sbatch refuses.
    """
    executor = make_executor(options, folder)
    for trial in trials:
        cfg = _task(trial)
        cfg.launch.nnodes = options.nodes
        trial.directory.mkdir(parents=True, exist_ok=True)
        rundir.check(trial.directory)
        launcher.prepare(cfg, trial.directory)
        trial.record_command()
        rundir.write_json(trial.directory, "status.json", {"state": "queued"})
    try:
        jobs = executor.map_array(Job(options.max_requeues), [str(trial.directory.resolve()) for trial in trials])
    except Exception as error:  # submitit's own kinds, whose text holds sbatch's message
        for trial in trials:
            trial.error = f"Slurm refused the job: {_refusal(str(error), options)}"
            trial.record_failure()
        raise UserError(f"{LAUNCHER}: {trials[0].error}") from error
    submitted = {}
    for job, trial in zip(jobs, trials, strict=True):
        rundir.write_json(trial.directory, RECORD, {"job": job.job_id, "output": str(job.paths.stdout)})
        log_stderr(f"{trial.name}: job {job.job_id}, {trial.directory / 'logs' / 'console.log'}")
        submitted[job.job_id] = trial
    return submitted


def make_executor(options: SlurmSchema, folder: Path) -> "SlurmExecutor":
    """Submitit's executor for these options.

    Raises:
        UserError: submitit is not installed.
    """
    slurm = _submitit()
    parameters = job_parameters(options, folder)
    executor = slurm.SlurmExecutor(folder / "%j", python=python_of(options))
    executor.update_parameters(**parameters)
    return executor


def script(options: SlurmSchema, folder: Path, trials: int = 1) -> str:
    """The batch script that `submit` would give to sbatch; nothing of Slurm is needed.

    Args:
        options: of the job.
        folder: for submitit's scripts.
        trials: several are one array.

    Raises:
        UserError: submitit is not installed.
    """
    slurm = _submitit()
    jobs = folder / "%j"
    python = python_of(options) or shlex.quote(sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(jobs))}"
    parameters = job_parameters(options, folder)
    return slurm._make_sbatch_string(command, jobs, map_count=trials if trials > 1 else None, **parameters)


def _submitit() -> ModuleType:
    try:
        import submitit.slurm.slurm
    except ImportError:
        raise UserError(f"{LAUNCHER}: submitit is not installed; run `uv sync --extra slurm`") from None
    return submitit.slurm.slurm


def python_of(options: SlurmSchema) -> str | None:
    """The command that starts Python on a node; None: the one that runs this command."""
    if options.python is None and options.container_image:
        return "python"
    return options.python


def job_parameters(options: SlurmSchema, folder: Path) -> dict[str, Any]:
    """Options as submitit's executor has them.

    Raises:
        UserError: one of them holds what a line of a batch script can't.
    """
    flags = []
    if options.container_image:
        flags.append(f"--container-image={options.container_image}")
    if options.container_mounts:
        flags.append(f"--container-mounts={options.container_mounts}")
    parameters = {
        "job_name": "posttrain",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "nodes": options.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": options.cpus_per_node,
        "signal_delay_s": options.signal_delay_s,
        "array_parallelism": options.array_parallelism,
        "setup": options.setup,
        # Outside of a container, where scontrol is: a task's exit code tells that it has saved.
        "teardown": ["code=$?", f'[ $code -eq {AGAIN} ] && scontrol requeue "$SLURM_JOB_ID"', "exit $code"],
        # A node that fails ends the others, which would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", *flags, *options.srun_args],
        "stderr_to_stdout": True,
    }
    extra: dict[str, Any] = {"requeue": True, "signal": f"{SAVE.name[3:]}@{options.signal_delay_s}"}
    if options.mem_gb is not None:
        extra["mem"] = f"{round(options.mem_gb * 1024)}M"
    parameters = without_none(parameters)
    python = python_of(options)
    _refuse_control(
        {**parameters, **extra, **options.sbatch, "time": options.time, "python": python, "folder": str(folder)}
    )
    # submitit has a default time limit, five minutes: None is the partition's.
    return {**parameters, "time": options.time, "additional_parameters": {**extra, **options.sbatch}}


def _refuse_control(parameters: dict[str, Any]) -> None:
    """Refuse control characters: a value becomes part of a line of the batch script, and a line end begins another.

    submitit quotes values, but a quoted line end still ends a `#SBATCH` line. `setup` and `teardown` are lines.

    Raises:
        UserError: a value, or the name of an option, holds a control character.
    """
    for name, value in parameters.items():
        texts = [name]
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, list | tuple) and name not in ("setup", "teardown"):
            texts += [item for item in value if isinstance(item, str)]
        if any(policy.CONTROL.search(text) for text in texts):
            raise UserError(f"{LAUNCHER}: {name!r}: holds a line end or control character")
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{LAUNCHER}: {name!r}: not the name of an option of sbatch")


def wait(waiting: dict[str, Trial], poll_s: float) -> None:
    """Wait until none of the jobs is in the queue any more; job id -> trial, see `run_jobs`."""
    working.stop()  # for hours, perhaps; what changes is told
    left = dict(waiting)
    printed = dict.fromkeys(waiting, WAITS)  # job id -> its last status line
    try:
        while left:
            queue = in_queue(patient=True)
            for job in [job for job in left if job not in queue]:
                trial = left.pop(job)
                collect(trial, job)
                log_stderr(f"{trial.name}: {trial.outcome()}")
            for job, trial in left.items():
                line = status_line(queue[job], printed[job])
                if line != printed[job]:
                    printed[job] = line
                    log_stderr(f"{trial.name}: {line}")
            if left:
                time.sleep(poll_s)
    except KeyboardInterrupt:
        numbers = " ".join(left)
        what = "1 job keeps" if len(left) == 1 else f"{len(left)} jobs keep"
        log_stderr(f"{what} running; `scancel {numbers}` ends what is left")
        raise


def status_line(columns: list[str], previous: str) -> str:
    """Where a queued job runs, or why it waits.

    Args:
        columns: the job's state, the reason for it and its nodes, as Slurm prints them.
        previous: the last line printed.
    """
    state, reason, hosts = columns
    if state == "RUNNING":
        return f"runs on {hosts}"
    if state != "PENDING":
        return previous
    if reason in ORDINARY_REASONS:
        return previous if previous.startswith(WAITS) else WAITS
    return f"{WAITS}: {reason}"


def in_queue(patient: bool = False) -> dict[str, list[str]]:
    """This user's jobs that have not ended: id, `12` or `12_3` -> columns, see `status_line`.

    Args:
        patient: wait while Slurm doesn't answer.

    Raises:
        UserError: it doesn't.
    """
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%T|%r|%N"]
    warned = False
    while True:
        squeue = subprocess.run(command, capture_output=True, text=True)
        if squeue.returncode == 0:
            break
        if not patient:
            first_line = squeue.stderr.strip().partition("\n")[0]
            raise UserError(f"{LAUNCHER}: Slurm doesn't answer ({first_line}){INSTEAD}")
        if not warned:
            log_stderr(f"squeue: {squeue.stderr.strip()}; waiting for Slurm")
            warned = True
        time.sleep(RETRY_S)
    jobs = {}
    for line in squeue.stdout.splitlines():
        job, *columns = line.split("|")
        jobs[job] = columns
    return jobs


def collect(trial: Trial, job: str) -> None:
    """Fill in the result of a job that has left the queue, from its run's record, else from Slurm's."""
    status = rundir.object_if_any(trial.directory, "status.json")
    state = status.get("state")
    if state in ("finished", "pruned"):
        trial.value = launcher.last_loss(trial.directory)
        return
    trial.error = status.get("error", "")
    trial.stopped = state == "stopped"
    if state in ("failed", "stopped") and trial.error:
        return
    end = end_of(job)
    log = trial.directory / "logs" / "console.log"
    if not log.exists():
        log = Path(rundir.object_if_any(trial.directory, RECORD).get("output", trial.directory))
    trial.error = f"job {job} {ENDS.get(end, f'ended as {end}')}\n  log: {log}"
    trial.stopped = end in ("CANCELLED", "PREEMPTED")
    trial.record_failure()


def end_of(job: str) -> str:
    """Slurm's state of an ended job: from its memory, which forgets after minutes, else from its accounting."""
    scontrol = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    fields = dict(field.split("=", 1) for field in scontrol.stdout.split() if "=" in field)
    if "JobState" in fields:
        return fields["JobState"]
    if shutil.which("sacct") is None:
        return "UNKNOWN"
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=State", "--jobs", job]
    states = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return states[0] if states else "UNKNOWN"


def _task(trial: Trial) -> DictConfig:
    return frozen.literal(trial.task_config())


def _refusal(text: str, options: SlurmSchema) -> str:
    """The reason in the output of sbatch, with the options that may be wrong."""
    lines = [line.partition("error: ")[2] for line in text.splitlines() if "error: " in line]
    reason = lines[-1] if lines else text.strip()
    if "partition" in reason.lower():
        sinfo = subprocess.run(["sinfo", "--noheader", "--format", "%R"], capture_output=True, text=True)
        names = sorted(set(sinfo.stdout.split()))
        return f"{reason} (hydra.launcher.partition={options.partition}); partitions: {', '.join(names)}"
    settings = []
    for name in ("nodes", "gpus_per_node", "cpus_per_node", "mem_gb", "time", "constraint", "account", "qos"):
        value = getattr(options, name)
        if value is not None:
            settings.append(f"{name}={value}")
    return f"{reason} (hydra.launcher: {', '.join(settings)})"
