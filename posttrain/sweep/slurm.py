"""Runs as jobs of a Slurm cluster: submitted through submitit, watched with squeue, judged by their status files."""

import getpass
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.config import frozen, policy
from posttrain.config.schema import SlurmSchema
from posttrain.errors import UserError
from posttrain.launch import launcher as launch
from posttrain.launch import nodes
from posttrain.plan import auto
from posttrain.spec import checks
from posttrain.sweep import tell
from posttrain.sweep.job import AGAIN, SAVE, Job
from posttrain.sweep.trial import Trial
from posttrain.utils import rundir

LAUNCHER = "hydra/launcher=slurm"
RECORD = "slurm.json"  # in a run directory: which job runs it
WAITS = "waits in the queue"
TURN = ("None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit")  # Slurm's reasons of a job whose turn comes
# What Slurm calls the end of a job that left no word of its own -> what to do about it.
ENDS = {
    "TIMEOUT": "reached its time limit before it could save; hydra.launcher.signal_delay_s may be too short",
    "OUT_OF_MEMORY": "used more memory than it asked for; set hydra.launcher.mem_gb",
    "NODE_FAIL": "lost its node; the same command resumes it",
    "PREEMPTED": "was preempted and not queued again; the same command resumes it",
    "CANCELLED": "was cancelled; the same command resumes it",
    "FAILED": "failed",
}


def with_launcher(argv: list[str]) -> list[str]:
    """The command line, where `launch.submit=true` stands for the Slurm launcher as well unless one is named."""
    submit = any(arg.lstrip("+").lower() == "launch.submit=true" for arg in argv)
    named = any(arg.startswith("hydra/launcher=") for arg in argv)
    return [*argv, LAUNCHER] if submit and not named else argv


def options_of(launcher: DictConfig) -> SlurmSchema | None:
    """The options of the Slurm launcher in a composed `hydra.launcher`, None if that is another launcher."""
    if launcher.get("_target_") != SlurmSchema._target_:
        return None
    return SlurmSchema(**OmegaConf.to_container(launcher, resolve=True))


def check_run(cfg: DictConfig, options: SlurmSchema) -> None:
    """What can be known to be wrong with a run before its job waits in a queue.

    Raises:
        UserError: the first thing found wrong.
    """
    cfg = cfg.copy()
    cfg.launch.nnodes, cfg.launch.node_rank = options.nodes, 0
    cfg.launch.master_port = nodes.PORTS[0]  # the job finds its own
    if cfg.parallelism.auto:
        if cfg.parallelism.memory_gib:
            auto.resolve(cfg, options.gpus_per_node)
        else:  # the job's node knows its GPUs; all else is checked as for one process
            cfg.parallelism.auto, cfg.parallelism.nproc_per_node, cfg.launch.nnodes = False, 1, 1
    if cfg.trainer.micro_batch_size == auto.AUTO:
        cfg.trainer.micro_batch_size = 1  # the job's node knows its GPUs' memory
    checks.check(cfg, options.gpus_per_node)


def run_jobs(trials: list[Trial], folder: Path) -> None:
    """Submit what is not in the queue yet and wait for all; their `value` and `error` are filled in.

    Trials whose options Slurm refuses have failed, and the others continue.

    Args:
        trials: to run, with their configurations.
        folder: for submitit's scripts.

    Raises:
        UserError: there is no Slurm here, or it refuses all jobs.
        KeyboardInterrupt: the command was told to stop. The jobs continue.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"{LAUNCHER}: there is no Slurm on this machine (no sbatch); use hydra/launcher=local")
    waiting, queue = {}, in_queue()
    refused = None
    fresh: dict[str, list[Trial]] = {}
    for trial in trials:
        job = rundir.object_if_any(trial.directory, RECORD).get("job")
        options = options_of(trial.config.hydra.launcher)
        if job in queue:
            tell(f"{trial.name}: is job {job} already")
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
            waiting |= submit(group, options_of(group[0].config.hydra.launcher), folder)
        except UserError as error:
            refused = error
    if refused and not waiting:
        raise refused
    if waiting:
        wait(waiting, min(options_of(trial.config.hydra.launcher).poll_s for trial in waiting.values()))


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
        launch.prepare(cfg, trial.directory)
        rundir.make(trial.directory, ".hydra")
        words = OmegaConf.to_yaml(trial.config.hydra.overrides.task)
        rundir.write_text(trial.directory, ".hydra/overrides.yaml", words)
        rundir.write_json(trial.directory, "status.json", {"state": "queued"})
    try:
        jobs = executor.map_array(Job(options.max_requeues), [str(trial.directory.resolve()) for trial in trials])
    except Exception as error:  # submitit's own kinds, whose text holds sbatch's words
        for trial in trials:
            trial.error = f"Slurm refused the job: {_refusal(str(error), options)}"
            trial.record_failure()
        raise UserError(f"{LAUNCHER}: {trials[0].error}") from error
    for job, trial in zip(jobs, trials, strict=True):
        rundir.write_json(trial.directory, RECORD, {"job": job.job_id, "output": str(job.paths.stdout)})
        tell(f"{trial.name}: job {job.job_id}, {trial.directory / 'logs' / 'console.log'}")
    return {job.job_id: trial for job, trial in zip(jobs, trials, strict=True)}


def make_executor(options: SlurmSchema, folder: Path) -> Any:
    """Submitit's executor for these options.

    Raises:
        UserError: submitit is not installed.
    """
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise UserError(f"{LAUNCHER}: submitit is not installed; run `uv sync --extra slurm`") from None
    container = {"container-image": options.container_image, "container-mounts": options.container_mounts}
    flags = [f"--{name}={value}" for name, value in container.items() if value]
    python = options.python or ("python" if options.container_image else None)
    wanted = {
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
        # Outside of a container, where scontrol is: the tasks say with their exit code that they have saved.
        "teardown": ["code=$?", f'[ $code -eq {AGAIN} ] && scontrol requeue "$SLURM_JOB_ID"', "exit $code"],
        # A node that fails ends the others, which would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", *flags, *options.srun_args],
        "stderr_to_stdout": True,
    }
    extra: dict[str, Any] = {"requeue": True, "signal": f"{SAVE.name[3:]}@{options.signal_delay_s}"}
    if options.mem_gb is not None:
        extra["mem"] = f"{round(options.mem_gb * 1024)}M"
    given = {name: value for name, value in wanted.items() if value is not None}
    _refuse_control({**given, **extra, **options.sbatch, "time": options.time, "python": python, "folder": str(folder)})
    executor = SlurmExecutor(folder / "%j", python=python)
    # submitit has a default time limit, five minutes: None is the partition's.
    executor.update_parameters(**given, time=options.time, additional_parameters={**extra, **options.sbatch})
    return executor


def _refuse_control(given: dict[str, Any]) -> None:
    """Every value becomes a line of the batch script, or a word of one: a line end in it would begin another line.

    submitit quotes values, but a quoted line end still ends a `#SBATCH` line. `setup` and `teardown` are lines.

    Raises:
        UserError: a value, or the name of an option, holds a control character.
    """
    for name, value in given.items():
        values = value if isinstance(value, list | tuple) and name not in ("setup", "teardown") else [value]
        texts = [str(name), *(item for item in values if isinstance(item, str))]
        if any(policy.CONTROL.search(item) for item in texts):
            raise UserError(f"{LAUNCHER}: {name!r}: holds a line end or control character")
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise UserError(f"{LAUNCHER}: {name!r}: not the name of an option of sbatch")


def wait(waiting: dict[str, Trial], poll_s: float) -> None:
    """Until none of the jobs is in the queue any more; job id -> trial, see `run_jobs`."""
    left, said = dict(waiting), {}
    try:
        while left:
            queue = in_queue(patient=True)
            for job in [job for job in left if job not in queue]:
                trial = left.pop(job)
                collect(trial, job)
                tell(f"{trial.name}: {trial.outcome()}")
            for job, trial in left.items():
                line = news(queue[job], said.get(job, WAITS))
                if line != said.setdefault(job, WAITS):
                    said[job] = line
                    tell(f"{trial.name}: {line}")
            if left:
                time.sleep(poll_s)
    except KeyboardInterrupt:
        numbers = " ".join(left)
        tell(f"{len(left)} jobs keep running; the same command waits for them again, `scancel {numbers}` ends them")
        raise


def news(place: list[str], said: str) -> str:
    """What to tell about a job in the queue, where `said` was told last: where it runs, or that and why it waits.

    Args:
        place: Slurm's words for its state, the reason for it, and its nodes.
    """
    state, reason, hosts = place
    if state == "RUNNING":
        return f"runs on {hosts}"
    if state != "PENDING":
        return said
    if reason in TURN:
        return said if said.startswith(WAITS) else WAITS
    return f"{WAITS}: {reason}"


def in_queue(patient: bool = False) -> dict[str, list[str]]:
    """This user's jobs that have not ended: id, `12` or `12_3` -> see `news`.

    Args:
        patient: wait while Slurm doesn't answer.

    Raises:
        UserError: it doesn't.
    """
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%T|%r|%N"]
    told = False
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return {job: place for job, *place in (line.split("|") for line in done.stdout.splitlines())}
        if not patient:
            raise UserError(f"{LAUNCHER}: Slurm doesn't answer: {done.stderr.strip()}")
        if not told:
            tell(f"squeue: {done.stderr.strip()}; waiting for Slurm")
            told = True
        time.sleep(10)


def collect(trial: Trial, job: str) -> None:
    """Fill in how a job that has left the queue went, by its run's record, else by what Slurm says."""
    status = rundir.object_if_any(trial.directory, "status.json")
    state = status.get("state")
    if state in ("finished", "pruned"):
        trial.value = launch.last_loss(trial.directory)
        return
    trial.error, trial.stopped = status.get("error", ""), state == "stopped"
    if state in ("failed", "stopped") and trial.error:
        return
    end = end_of(job)
    output = Path(rundir.object_if_any(trial.directory, RECORD).get("output", trial.directory))
    console = trial.directory / "logs" / "console.log"
    trial.error = f"job {job} {ENDS.get(end, f'ended as {end}')}\n  log: {console if console.exists() else output}"
    trial.stopped = end in ("CANCELLED", "PREEMPTED")
    trial.record_failure()


def end_of(job: str) -> str:
    """Slurm's word for how a job ended: from its memory, which forgets after minutes, else from its accounting."""
    show = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    words = dict(word.split("=", 1) for word in show.stdout.split() if "=" in word)
    if "JobState" in words:
        return words["JobState"]
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=State", "--jobs", job]
    if shutil.which("sacct") and (said := subprocess.run(command, capture_output=True, text=True).stdout.split()):
        return said[0]
    return "UNKNOWN"


def _task(trial: Trial) -> DictConfig:
    return frozen.literal(trial.task_config())


def _refusal(text: str, options: SlurmSchema) -> str:
    """The reason in what sbatch said, with what could be said instead."""
    lines = [line.partition("error: ")[2] for line in text.splitlines() if "error: " in line]
    reason = lines[-1] if lines else text.strip()
    if "partition" in reason.lower():
        names: Sequence[str] = subprocess.run(
            ["sinfo", "--noheader", "--format", "%R"], capture_output=True, text=True
        ).stdout.split()
        return f"{reason} (hydra.launcher.partition={options.partition}); partitions: {', '.join(sorted(set(names)))}"
    asked = ("nodes", "gpus_per_node", "cpus_per_node", "mem_gb", "time", "constraint", "account", "qos")
    said = ", ".join(f"{name}={getattr(options, name)}" for name in asked if getattr(options, name) is not None)
    return f"{reason} (hydra.launcher: {said})"
