"""What Slurm would be given: the batch script on standard output, what it starts on standard error."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.schema import SlurmSchema
from posttrain.sweep import log_stderr, slurm


@dataclass(frozen=True)
class PlannedJob:
    """A run that would become a job, or one trial of an array.

    Attributes:
        options: of the Slurm launcher.
        directory: of the run; of a trial its sweep's.
        processes: that the job's task starts on each node.
    """

    options: SlurmSchema
    directory: Path
    processes: int


def show(jobs: Sequence[PlannedJob]) -> None:
    """Print the script of each job; those with the same options are one array, as `slurm.run_jobs` submits them.

    Raises:
        UserError: submitit is not installed.
    """
    arrays: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        arrays.setdefault(repr(job.options), []).append(job)
    for alike in arrays.values():
        first = alike[0]
        options = first.options
        print(slurm.script(options, first.directory / ".submitit", len(alike)), flush=True)
        run = first.directory
        what = "the run"
        if len(alike) > 1:
            what = f"each of the {len(alike)} trials"
            run = first.directory / "TRIAL"
        where = "one node" if options.nodes == 1 else f"each of {options.nodes} nodes"
        log_stderr(
            f"of {what}, srun starts one task on {where}; the task starts "
            f"{first.processes} process{'es' * (first.processes > 1)}: python -m posttrain.launch.worker "
            f"{shlex.quote(str(run))}"
        )
        for line in _left_to_the_cluster(options):
            log_stderr(line)
    log_stderr("dry run: nothing was submitted or written; without hydra.launcher.dry_run=true sbatch gets the script")


def _left_to_the_cluster(options: SlurmSchema) -> Iterator[str]:
    """What the script doesn't say, and how it is said."""
    if options.time is None:
        yield "no time limit is set: the partition's default holds; hydra.launcher.time=8:00:00 sets one"
    unset = [name for name in ("partition", "account", "qos") if getattr(options, name) is None]
    if unset:
        yield f"not set, so the cluster's default: {', '.join(f'hydra.launcher.{name}' for name in unset)}"
    yield "all keys of the job, with what they mean: python -m posttrain options hydra/launcher"
