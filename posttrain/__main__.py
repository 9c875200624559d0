"""`python -m posttrain`: compose the configuration, check it, start the processes that train."""

from posttrain.utils import stop

if __name__ == "__main__":
    stop.exit_on_signals()  # before the imports below, which take most of a second

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from posttrain import patches
from posttrain.cli import command, help_screen
from posttrain.config import composition
from posttrain.errors import RunFailed, UserError
from posttrain.launch import launcher, nodes, prestart
from posttrain.patches.registry import versions_of
from posttrain.plan import auto
from posttrain.recipes import catalog
from posttrain.spec import checks, first_rows
from posttrain.spec.record import specify
from posttrain.sweep import slurm
from posttrain.sweep.trial import Trial
from posttrain.utils.gpus import visible_gpus


def task(cfg: DictConfig) -> float | None:
    """One run; returns its last validation loss so that a sweeper can compare trials."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if cfg.launch.submit and HydraConfig.get().mode is RunMode.RUN:
        return submit(cfg, run_dir)
    nodes.adopt(cfg)
    gpus = visible_gpus()
    line = auto.resolve(cfg, gpus)
    if line and nodes.first(cfg):
        print(line, flush=True)
    architecture = checks.check(cfg, gpus)
    untested = patches.check(patches.Platform.with_gpus(gpus))
    if untested and nodes.first(cfg):
        print(f"posttrain: {patches.UNTESTED}=1: {versions_of(untested)}", file=sys.stderr, flush=True)
    return launcher.launch(cfg, run_dir, gpus, specify(cfg, gpus, architecture))


def submit(cfg: DictConfig, run_dir: Path) -> float | None:
    """One run as a Slurm job, waited for; returns its last validation loss.

    Raises:
        UserError: there is no Slurm, or it refuses the job.
        RunFailed: the job failed, or was stopped.
    """
    with_hydra = cfg.copy()
    with open_dict(with_hydra):
        with_hydra.hydra = HydraConfig.get()
    trial = Trial(run_dir.name, run_dir, with_hydra)
    slurm.run_jobs([trial], run_dir / ".submitit")
    if trial.error:
        raise RunFailed(trial.error)
    return trial.value


def before(cfg: DictConfig) -> None:
    """What can be refused before there is a directory for the run.

    Args:
        cfg: composed with `hydra`.
    """
    options = slurm.options_of(cfg.hydra.launcher)
    with open_dict(cfg):
        del cfg["hydra"]
    sweeping = bool({"-m", "--multirun"} & set(sys.argv))
    if cfg.sweep.pruner and not sweeping:
        raise UserError(f"`sweep.pruner={cfg.sweep.pruner}`: requires --multirun")
    if options and (sweeping or cfg.launch.submit):
        slurm.check_run(cfg, options)
        first_rows.look(cfg)
        return
    if options or cfg.launch.submit:
        raise UserError(f"{slurm.LAUNCHER}: requires launch.submit=true for one run, or with --multirun")
    nodes.adopt(cfg)
    nodes.check_directory(cfg, sys.argv)
    gpus = visible_gpus()
    gpus_of_trial = gpus
    if sweeping and gpus:
        gpus_of_trial = max(1, gpus // cfg.sweep.parallel)
    auto.resolve(cfg, gpus_of_trial)
    checks.check(cfg, gpus)
    first_rows.look(cfg)


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
        sys.argv[1:] = slurm.with_launcher(nodes.agree_on_directory(sys.argv[1:]))
    except UserError as error:
        stop.fail(str(error))
    prestart.start(sys.argv[1:])
    command.run(task, check=before)


if __name__ == "__main__":
    main()
