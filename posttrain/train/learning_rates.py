"""Megatron's scheduler follows the run's schedule, for every group of parameters in proportion."""

import math
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from posttrain.errors import UserError
from posttrain.spec.schedule import Schedule

COMPARED = 10_000  # steps of a run, at most


class ProportionalScheduler(OptimizerParamScheduler):
    """Megatron's scheduler, in which a group with another peak (LoRA+) has its ratio to the others in every step.

    Megatron's own starts the warm-up of all groups at one rate.
    """

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The group's learning rate."""
        peak = param_group.get("max_lr") or self.max_lr
        floor = param_group.get("min_lr") or 0.0
        if not math.isclose(floor * self.max_lr, self.min_lr * peak, rel_tol=1e-9):
            return float(super().get_lr(param_group))  # a group with a floor of its own
        return float(super().get_lr({})) * peak / self.max_lr


def follow(scheduler: OptimizerParamScheduler, schedule: Schedule, batch: int) -> None:
    """Give every group its rate, and compare Megatron's rates with the schedule's, step by step.

    Args:
        scheduler: of the optimizer; changed in place.
        schedule: the run's.
        batch: rows of a step, in which Megatron counts.

    Raises:
        UserError: they differ, so that something else would be trained than was said.
    """
    if scheduler.max_lr:
        scheduler.__class__ = ProportionalScheduler
    now = scheduler.num_steps
    for step in range(1, schedule.steps + 1, math.ceil(schedule.steps / COMPARED)):
        scheduler.num_steps = (step - 1) * batch
        found = OptimizerParamScheduler.get_lr(scheduler, {})
        right = schedule.rate(step)
        if not math.isclose(found, right, rel_tol=1e-9, abs_tol=1e-12 * schedule.peak):
            raise UserError(
                f"learning rate: Megatron's scheduler has {found:g} at step {step}, and {right:g} was asked for; set "
                "rates in the groups optimizer and scheduler, not under trainer.megatron"
            )
    scheduler.num_steps = now
    scheduler.step(0)
