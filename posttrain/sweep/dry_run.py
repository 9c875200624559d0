"""What Slurm would be given: the batch script on standard output, what it starts and trains on standard error."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from posttrain.config.schema import SlurmSchema
from posttrain.config.trial_names import swept_values
from posttrain.convert.training_metadata import describe_method, source_names
from posttrain.spec import checks
from posttrain.spec.parallel_sizes import ParallelSizes, model_parallel_sizes
from posttrain.sweep import log_stderr, slurm
from posttrain.sweep.optuna import Search
from posttrain.utils.escape import escape_control


@dataclass(frozen=True)
class PlannedJob:
    """A run that would become a job, or one trial of an array.

    Attributes:
        options: of the Slurm launcher.
        directory: of the run; of a trial its sweep's.
        cfg: as composed, and checked.
        overrides: that it is composed of.
        swept: the keys that a sweep varies -> what they take.
        search: that proposes the trials; None: a grid, or one run.
    """

    options: SlurmSchema
    directory: Path
    cfg: DictConfig
    overrides: Sequence[str]
    swept: Mapping[str, str]
    search: Search | None = None

    @property
    def processes(self) -> int:
        """That the job's task starts on each node."""
        return checks.nproc_per_node(self.cfg, self.options.gpus_per_node)

    def training(self) -> dict[str, str]:
        """What is trained, on what and how: a few words under a heading each."""
        cfg, trainer = self.cfg, self.cfg.trainer
        length = f"{trainer.epochs} epochs" if trainer.max_steps is None else f"{trainer.max_steps} steps"
        return {
            "model": f"{cfg.model.path}, {describe_method(cfg.peft)}",
            "data": ", ".join(source_names(cfg.data)),
            "training": f"{length}, each of {trainer.global_batch_size} sequences of {trainer.seq_length} tokens "
            f"(micro_batch_size {trainer.micro_batch_size})",
            "layout": self._layout(),
        }

    def _layout(self) -> str:
        """Machines and processes, and what these divide."""
        options = self.options
        machines = _count(options.nodes, "node")
        each = f"x {_count(options.gpus_per_node, 'GPU')}" if options.gpus_per_node else "on CPUs"
        sizes = ParallelSizes(world=self.processes * options.nodes, **model_parallel_sizes(self.cfg))
        if self.cfg.parallelism.auto:
            divided = "divided as parallelism=auto finds there"
        else:
            divided = f"data parallel {sizes.data_parallel}"
            for name, size in model_parallel_sizes(self.cfg).items():
                if size > 1:
                    divided += f", {name} {size}"
        return f"{machines} {each}: {_count(sizes.world, 'process', 'es')}, {divided}"


def show(jobs: Sequence[PlannedJob]) -> None:
    """Print the script of each job; those with the same options are one array, as `slurm.run_jobs` submits them.

    Of a search the script of the trials that are proposed together.

    Raises:
        UserError: submitit is not installed.
    """
    arrays: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        arrays.setdefault(repr(job.options), []).append(job)
    for alike in arrays.values():
        first = alike[0]
        options = first.options
        count = len(alike)
        what = "the run"
        if count > 1:
            what = f"each of the {count} trials"
        if first.search:
            count = first.search.at_once
            what = "each trial"
        print(slurm.script(options, first.directory / ".submitit", count), flush=True)
        run = first.directory
        if first.swept:
            run = first.directory / "TRIAL"
        where = "one node" if options.nodes == 1 else f"each of {options.nodes} nodes"
        log_stderr(
            f"of {what}, srun starts one task on {where}; the task starts {_count(first.processes, 'process', 'es')}: "
            f"python -m posttrain.launch.worker {shlex.quote(str(run))}"
        )
        for line in _trained(alike):
            log_stderr(escape_control(line))
        log_stderr(f"run directory: {escape_control(str(run))}")
        for line in _left_to_the_cluster(options):
            log_stderr(line)
    log_stderr("dry run: nothing was submitted or written; without hydra.launcher.dry_run=true sbatch gets the script")


def _trained(jobs: Sequence[PlannedJob]) -> Iterator[str]:
    """What the jobs train: what they share once, then what each trial has for itself."""
    shared = [override for override in jobs[0].overrides if all(override in job.overrides for job in jobs)]
    yield f"overrides: {shlex.join(shared) or 'none'}"
    by_heading: dict[str, dict[str, None]] = {}  # in the order of the trials, each text once
    for job in jobs:
        for heading, text in job.training().items():
            by_heading.setdefault(heading, {})[text] = None
    for heading, texts in by_heading.items():
        yield f"{heading}: {' | '.join(texts)}"
    if jobs[0].search:
        yield from _searched(jobs[0].search, jobs[0].swept)
    elif jobs[0].swept:
        for number, job in enumerate(jobs, 1):
            values = swept_values(job.overrides, list(job.swept))
            yield f"trial {number}: {_assignments(values)}"


def _searched(search: Search, space: Mapping[str, str]) -> Iterator[str]:
    """How many trials a search has, and where their values come from."""
    together = "one at a time"
    submitted = "a job is submitted when the one before it has ended"
    if search.at_once > 1:
        together = f"{search.at_once} at a time"
        submitted = f"an array of {search.at_once} jobs is submitted when all jobs of the one before it have ended"
    yield f"search: {_count(search.trials, 'trial')} at most, {together} (sweep.parallel): {submitted}"
    yield f"values: {_assignments(space)}: the search proposes them, later ones from the results of earlier ones"


def _assignments(values: Mapping[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _count(number: int, what: str, plural: str = "s") -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{plural}"


def _left_to_the_cluster(options: SlurmSchema) -> Iterator[str]:
    """What the script doesn't say, and how it is said."""
    if options.time is None:
        yield "no time limit is set: the partition's default holds; hydra.launcher.time=8:00:00 sets one"
    unset = [name for name in ("partition", "account", "qos") if getattr(options, name) is None]
    if unset:
        yield f"not set, so the cluster's default: {', '.join(f'hydra.launcher.{name}' for name in unset)}"
    yield "all keys of the job, with what they mean: python -m posttrain options hydra/launcher"
