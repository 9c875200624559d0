"""`python -m posttrain`: compose the configuration, check it, start the processes that train."""

from posttrain.cli import subcommands
from posttrain.utils import stop, terminal

if __name__ == "__main__":
    stop.exit_on_signals()  # before the imports below, which take most of a second
    subcommands.run_named()
    terminal.greet()

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from posttrain import patches
from posttrain.cli import command, help_screen, precheck, rerun, run_file
from posttrain.config import composition
from posttrain.config.overrides import format_value, quote_expressions
from posttrain.config.trial_names import check_swept, swept_ranges
from posttrain.errors import RunFailed, UserError
from posttrain.launch import launcher, nodes, prestart
from posttrain.patches.registry import versions_of
from posttrain.plan import auto
from posttrain.recipes import catalog
from posttrain.spec import checks, first_rows
from posttrain.spec.record import specify
from posttrain.sweep import dry_run, optuna, slurm
from posttrain.sweep.trial import Trial
from posttrain.utils.command_line import typed_command
from posttrain.utils.gpus import visible_gpus
from posttrain.utils.output_paths import check_directory

SWEEP_DIR = "hydra.sweep.dir"


@dataclass(frozen=True)
class Settled:
    """A configuration that is ready to run.

    Attributes:
        cfg: checked, its processes and sizes decided.
        line: about what was `auto` in it; None: nothing was.
        architecture: see posttrain.spec.checks.check.
    """

    cfg: DictConfig
    line: str | None
    architecture: Mapping[str, Any] | None


_settled: dict[str, Settled] = {}  # by the text of what was composed: before Hydra makes a directory, then for the run


def settle(composed: DictConfig, gpus: int, parallel: int = 1) -> Settled:
    """Decide what is left open and check the whole, once in this command.

    Args:
        composed: without `hydra`.
        gpus: visible ones.
        parallel: how many trials may share them.

    Raises:
        UserError: the first thing found wrong.
    """
    text = OmegaConf.to_yaml(composed)
    if text not in _settled:
        cfg = composed.copy()
        nodes.adopt(cfg)
        architecture = checks.check_settings(cfg, gpus)
        setting = "torchrun --nproc-per-node" if nodes.torchrun() else None
        count = checks.process_count(cfg, gpus, setting)
        line = auto.resolve(cfg, max(1, gpus // parallel) if gpus else 0)
        checks.check_parallelism(cfg, gpus, architecture, count)
        _settled[text] = Settled(cfg, line, architecture)
    return _settled[text]


def task(cfg: DictConfig) -> float | None:
    """One run; returns its last validation loss so that a sweeper can compare trials."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if cfg.launch.submit and HydraConfig.get().mode is RunMode.RUN:
        return submit(cfg, run_dir)
    gpus = visible_gpus()
    settled = settle(cfg, gpus)
    cfg = settled.cfg
    if settled.line and nodes.first(cfg):
        print(settled.line, flush=True)
    untested = patches.check(patches.Platform.with_gpus(gpus))
    if untested and nodes.first(cfg):
        print(f"posttrain: {patches.UNTESTED}=1: {versions_of(untested)}", file=sys.stderr, flush=True)
    return launcher.launch(cfg, run_dir, gpus, specify(cfg, gpus, settled.architecture))


def submit(cfg: DictConfig, run_dir: Path) -> float | None:
    """One run as a Slurm job, waited for; returns its last validation loss.

    Raises:
        UserError: there is no Slurm, or it refuses the job.
        RunFailed: the job failed, or was stopped.
        Stopped: this command was told to stop; a job that was submitted continues.
    """
    with_hydra = cfg.copy()
    with open_dict(with_hydra):
        with_hydra.hydra = HydraConfig.get()
    trial = Trial(run_dir.name, run_dir, with_hydra)
    try:
        slurm.run_jobs([trial], run_dir / ".submitit")
    except KeyboardInterrupt as error:
        again = typed_command({"hydra.run.dir": format_value(str(run_dir))})
        raise stop.Stopped(stop.signal_of(error), advice=f"to wait for the job again: {again}") from None
    if trial.error:
        raise RunFailed(trial.error)
    return trial.value


def before(cfg: DictConfig, jobs: list[dry_run.PlannedJob], places: dict[str, Path]) -> None:
    """What can be refused before there is a directory for the run.

    Args:
        cfg: composed with `hydra`.
        jobs: gets the Slurm job that the run is to be, if it is.
        places: gets the directory that is to be written, by the key that names it.
    """
    options = slurm.options_of(cfg.hydra.launcher)
    sweeping = bool({"-m", "--multirun"} & set(sys.argv))
    overrides = list(cfg.hydra.overrides.task)
    directory = directory_of(cfg, sweeping)
    places[SWEEP_DIR if sweeping else rerun.RUN_DIR] = directory
    swept: dict[str, str] = {}
    search = None
    if sweeping:
        swept = swept_ranges(cfg.hydra.overrides.task, cfg.hydra.sweeper.get("params"))
        check_swept(swept)
        search = optuna.search_of(cfg)
    optuna.check(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    if cfg.sweep.pruner and not sweeping:
        raise UserError(f"`sweep.pruner={cfg.sweep.pruner}`: requires --multirun")
    if options and (sweeping or cfg.launch.submit):
        slurm.check_run(cfg, options)
        checks.check_trackers(cfg)
        first_rows.look(cfg)
        checks.check_hub(cfg)
        jobs.append(dry_run.PlannedJob(options, directory, cfg, overrides, swept, search))
        return
    if options or cfg.launch.submit:
        raise UserError(f"{slurm.LAUNCHER}: requires launch.submit=true for one run, or with --multirun")
    settled = settle(cfg, visible_gpus(), cfg.sweep.parallel if sweeping else 1)
    if nodes.first(settled.cfg):
        checks.check_trackers(settled.cfg)
        if not sweeping:
            launcher.check_place(settled.cfg, directory)
    nodes.check_directory(settled.cfg, sys.argv)
    first_rows.look(settled.cfg)
    if nodes.first(settled.cfg):
        checks.check_hub(settled.cfg)


def directory_of(cfg: DictConfig, sweeping: bool) -> Path:
    """Where the files of a run will be put, or of a sweep, whose name is made of the whole command line.

    Args:
        cfg: composed with `hydra`; of a sweep one of its trials.
        sweeping: whether it is one.
    """
    if not sweeping:
        return Path(cfg.hydra.run.dir).absolute()
    with open_dict(cfg):
        cfg.hydra.overrides.task = [one for one in sys.argv[1:] if "=" in one and not one.startswith("-")]
    return Path(cfg.hydra.sweep.dir).absolute()


def before_writing(jobs: Sequence[dry_run.PlannedJob], places: Mapping[str, Path]) -> None:
    """See that what has been checked can be written, and submitted where it is to be; or show it and leave.

    Args:
        jobs: the Slurm jobs that the runs are to be, if they are.
        places: the directories that are to be written, by the keys that name them.

    Raises:
        UserError: a directory can't be written, or there is no Slurm.
    """
    if any(job.options.dry_run for job in jobs):
        dry_run.show(jobs)
        if len(jobs) == precheck.MOST_TRIALS and not jobs[0].search:
            print(f"posttrain: no more than {len(jobs)} trials of a grid are shown; all are submitted", file=sys.stderr)
        raise SystemExit
    for key, directory in places.items():
        check_directory(directory, key)
    if jobs:
        slurm.require()


@stop.command
def main() -> None:
    """Entry point of `python -m posttrain` and of the `posttrain` script."""
    stop.outlive_terminal()
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_screen.render(composition.CONF_DIR, composition.PACKAGE))
        return
    if {"recipe=list", "recipe.name=list"} & set(sys.argv[1:]):
        print(catalog.format_list())
        return
    if {"-sc", "--shell-completion"} & set(sys.argv[1:]):
        # What Hydra completes is this command; for `python -m posttrain` it would replace the completion of `python`.
        sys.argv[0] = "posttrain"
    try:
        arguments = rerun.expand(run_file.expand(quote_expressions(sys.argv[1:])))
        sys.argv[1:] = slurm.with_launcher(nodes.agree_on_directory(arguments))
    except UserError as error:
        stop.fail(str(error))
    prestart.start(sys.argv[1:])
    jobs: list[dry_run.PlannedJob] = []
    places: dict[str, Path] = {}
    check = functools.partial(before, jobs=jobs, places=places)
    command.run(task, check=check, checked=lambda: before_writing(jobs, places), sized=True)


if __name__ == "__main__":
    main()
