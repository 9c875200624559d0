"""Hydra finds launchers in the namespace `hydra_plugins` only; what this one does is in `posttrain.sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from posttrain.errors import RunFailed
from posttrain.utils import rundir

if TYPE_CHECKING:
    from posttrain.sweep.screen import SweepScreen
    from posttrain.sweep.trial import Trial
    from posttrain.utils.stop import Stopped


class Outcome(JobReturn):
    """A trial's result; Hydra's own would print all of a failed trial's words before its error is raised."""

    @property
    def return_value(self) -> Any:
        """The validation loss.

        Raises:
            RunFailed: there is none.
        """
        if isinstance(self._return_value, Exception):
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class LocalLauncher(Launcher):
    """Each trial of a sweep in a process of its own on this machine; finished trials are not run again.

    Attributes:
        begun: what trials are called that have begun, when this command is told to stop.
    """

    begun = "interrupted"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra, before it writes to the sweep's directory."""
        rundir.check_sweep(Path(config.hydra.sweep.dir))
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config
        self.screen: SweepScreen | None = None
        self.trials: dict[Path, Trial] = {}  # by directory; a search launches several times

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; returns one result per job, in order, failed ones included."""
        from posttrain.sweep import launched

        setup_globals()
        by_directory: dict[Path, Trial] = {}  # a trial that is asked for twice is run once
        jobs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            trial = self._trial(overrides, number)
            jobs.append(by_directory.setdefault(trial.directory, trial))
        trials = list(by_directory.values())
        launched.add(Path(self.config.hydra.sweep.dir))
        self.trials |= by_directory
        try:
            self._run_all(trials)
        except KeyboardInterrupt as error:
            raise self._stopped(error) from None
        failed = [trial.name for trial in trials if trial.error]
        return [self._result(trial, failed, len(trials)) for trial in jobs]

    def _run_all(self, trials: "list[Trial]") -> None:
        from posttrain.sweep.local import run_trials
        from posttrain.sweep.screen import SweepScreen
        from posttrain.utils.stop import Stopped

        if self.screen is None:
            self.screen = SweepScreen(self._total(), self.config.sweep.parallel)
        number = run_trials(trials, self._run, self.screen)
        if number is not None:
            raise Stopped(number)

    def _total(self) -> int:
        """Trials of the whole sweep; of a search at most."""
        return self.config.hydra.sweeper.get("n_trials") or len(self.trials)

    def _stopped(self, error: KeyboardInterrupt) -> "Stopped":
        """The error of a command that was told to stop, with what is done and how to continue."""
        from posttrain.sweep import continuation
        from posttrain.utils.stop import Stopped, signal_of

        done = continuation.describe_progress(list(self.trials.values()), self._total(), self.begun)
        advice = continuation.how_to_continue(self.config, Path(self.config.hydra.sweep.dir))
        return Stopped(signal_of(error), done, advice)

    def _trial(self, overrides: Sequence[str], number: int) -> "Trial":
        from posttrain.config.trial_names import swept_keys, trial_name
        from posttrain.spec import inputs
        from posttrain.sweep.trial import Trial, name_for_inputs

        hydra = self.config.hydra
        values = trial_name(overrides, swept_keys(hydra.overrides.task, hydra.sweeper.get("params")))
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        sweep_dir = Path(config.hydra.sweep.dir)
        name = values
        if rundir.is_folder(sweep_dir, values):  # refused where it is a link
            name = name_for_inputs(sweep_dir, values, inputs.digests(config))
        with open_dict(config):
            config.hydra.sweep.subdir = name
            config.hydra.job.id = config.hydra.job.num = number
        return Trial(name, sweep_dir / name, config)

    def _run(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    @staticmethod
    def _result(trial: "Trial", failed: list[str], count: int) -> JobReturn:
        result = Outcome(
            overrides=list(trial.config.hydra.overrides.task),
            working_dir=str(trial.directory),
            status=JobStatus.COMPLETED,
        )
        result.return_value = trial.value
        if trial.error:
            result.status = JobStatus.FAILED
            result.return_value = RunFailed(f"{len(failed)} of {count} trials failed: {', '.join(failed)}")
        return result


class SlurmLauncher(LocalLauncher):
    """Each trial of a sweep as a job of a Slurm cluster; what is finished, or in the queue, is not submitted again.

    Args:
        options: see conf/hydra/launcher/slurm.yaml. Each trial's own are read from its configuration.
    """

    begun = "in the queue"

    def __init__(self, **options) -> None:
        pass

    def _run_all(self, trials: "list[Trial]") -> None:
        from posttrain.sweep import log_stderr
        from posttrain.sweep.slurm import run_jobs

        todo = [trial for trial in trials if not trial.already_finished()]
        if len(todo) < len(trials):
            log_stderr(f"{len(trials) - len(todo)} of {len(trials)} trials have already finished")
        run_jobs(todo, Path(self.config.hydra.sweep.dir, ".submitit"))
