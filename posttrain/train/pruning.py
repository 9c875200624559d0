"""Which trials of a sweep end early, by the validation losses that all of them have left so far.

A trial decides for itself after a validation, from its neighbours' directories: the same on one machine, with several
trials at once and as Slurm jobs. The rules are Optuna's MedianPruner and SuccessiveHalvingPruner (Li et al. 2020,
"A System for Massively Parallel Hyperparameter Tuning"); importing Optuna would take longer than Megatron.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

from posttrain.config.schema import SweepSchema
from posttrain.report.trials import read_series
from posttrain.spec import inputs
from posttrain.utils import rundir

REDUCTION = 4  # of the trials at one rung, one in so many moves on to the next, which is so many times as far

Curve = dict[int, float]  # step -> validation loss


def verdict(run_dir: Path, sweep: SweepSchema) -> str | None:
    """Why the trial in `run_dir` should end now, None if it should continue.

    Args:
        run_dir: of a trial that has just validated; its neighbours are the other trials.
        sweep: the config group, see conf/config.yaml.
    """
    own = curve(run_dir)
    others = []
    for path in run_dir.parent.glob("*/metrics.jsonl"):
        if path.parent != run_dir and _validation(path.parent) == _validation(run_dir):
            others.append(path.parent)
    finished = [curve(path) for path in others if _state(path) == "finished"]
    if sweep.pruner == "median":
        bad = above_median(own, finished, sweep.pruner_startup_trials, sweep.pruner_warmup_steps)
        against = f"{len(finished)} finished trial{'s' * (len(finished) > 1)}"
    else:
        curves = list(map(curve, others))
        bad = not among_best(own, curves, sweep.pruner_warmup_steps or min(own))
        as_far = sum(max(other, default=0) >= max(own) for other in curves)
        against = f"{as_far} trial{'s' * (as_far > 1)} that came as far"
    step = max(own)
    return f"pruned after step {step}: validation loss {own[step]:.4g}, against {against}" if bad else None


def above_median(own: Curve, finished: list[Curve], startup_trials: int, warmup_steps: int) -> bool:
    """Whether the best loss so far is above the median of the finished trials' losses at the same step."""
    step = max(own)
    if len(finished) < startup_trials or step < warmup_steps:
        return False
    there = [other[step] for other in finished if step in other]
    return bool(there) and min(own.values()) > statistics.median(there)


def among_best(own: Curve, others: Iterable[Curve], first: int) -> bool:
    """Whether the last loss is in the best part of all at each rung that this step is the first to reach.

    Args:
        own, others: losses of the trial, and of all the others, whatever became of them.
        first: the step of the first rung.
    """
    curves, rung = [own, *others], first
    before, step = sorted([0, *own])[-2:]
    while rung <= step:
        if rung > before:
            there = sorted(loss for c in curves if (loss := _at(c, rung)) is not None)
            if own[step] > there[max(len(there) // REDUCTION, 1) - 1]:
                return False
        rung *= REDUCTION
    return True


def curve(run_dir: Path) -> Curve:
    """A trial's validation losses, without the one before training."""
    return {step: loss for step, loss in read_series(run_dir).get("val_loss", []) if step > 0}


def _at(curve: Curve, rung: int) -> float | None:
    """The first loss at or beyond a rung."""
    return next((curve[step] for step in sorted(curve) if step >= rung), None)


def _validation(run_dir: Path) -> object:
    """A digest of the rows that a trial is validated on; None: it doesn't say."""
    return rundir.object_if_any(run_dir, inputs.FILE).get("validation")


def _state(run_dir: Path) -> str | None:
    return rundir.object_if_any(run_dir, "status.json").get("state")
