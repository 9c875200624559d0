"""The learning rate of every step, decided once; Megatron's scheduler is set from it and compared with it.

The shapes are Megatron-Core's (`OptimizerParamScheduler`): a linear warm-up, then constant, linear, cosine,
inverse-square-root, or stable with a decay at the end (WSD, arXiv 2404.06395). The warm-up begins at its first
fraction, not at a step that changes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from posttrain.errors import UserError

# Share of a decay that is done -> share of the rate that is left.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (math.cos(math.pi * share) + 1) / 2,
    "exponential": lambda share: 2 * math.pow(0.5, share) - 1,
    "minus_sqrt": lambda share: 1 - math.sqrt(share),
}


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run.

    Attributes:
        style: Megatron's name of the shape after the warm-up.
        peak, floor: the highest rate, and the one that is decayed to.
        steps: of the run.
        warmup: steps over which the rate rises to the peak; a share of few steps may be a fraction.
        horizon: steps after which the floor is reached; more than `steps` where the run ends before that.
        final: steps of WSD's decay, which end with the horizon.
        final_style: its shape.
        notes: what was asked for and can't be, and what is done instead.
    """

    style: str
    peak: float
    floor: float
    steps: int
    warmup: float
    horizon: int
    final: int = 0
    final_style: str = "linear"
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> float:
        """The rate of the first step of a warm-up."""
        return self.peak / (int(self.warmup) + 1)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        done = step - 1
        if self.warmup > 0 and done <= self.warmup:
            return self.first + (self.peak - self.first) * done / self.warmup
        if self.style == "constant":
            return self.peak
        if done > self.horizon:
            return self.floor
        if self.style == "inverse-square-root":
            return max(self.floor, self.peak * math.sqrt(self.warmup / done))
        share = (done - self.warmup) / (self.horizon - self.warmup)
        decay = DECAYS.get(self.style)
        if self.style == "WSD":
            decay = DECAYS[self.final_style]
            share = max(0.0, (done - self.horizon + self.final) / self.final)
        assert decay is not None
        return self.floor + (self.peak - self.floor) * decay(share)

    def describe(self) -> str:
        """One line: the first rate, the highest, the last step's, and the shape."""
        text = f"{self.rate(1):.3g} at step 1"
        top = min(self.steps, int(self.warmup) + 1)
        if top > 1:
            text += f", {self.rate(top):.3g} at step {top}"
        if self.steps > top:
            text += f", {self.rate(self.steps):.3g} at step {self.steps}"
        return f"{text} ({self.style})"


def schedule_of(cfg: DictConfig, steps: int) -> Schedule:
    """The schedule of a checked configuration.

    Args:
        cfg: with the groups `optimizer` and `scheduler`.
        steps: of the run.

    Raises:
        UserError: the shape requires a warm-up, and there is none.
    """
    scheduler = cfg.scheduler
    notes = []
    warmup = float(scheduler.get("lr_warmup_iters") or 0)
    if not warmup:
        warmup = (scheduler.get("lr_warmup_fraction") or 0.0) * steps
    if scheduler.lr_decay_style == "inverse-square-root" and warmup < 1:
        raise UserError(
            "`scheduler.lr_decay_style=inverse-square-root`: falls in proportion to the warm-up, which has to be a "
            "step or more; set scheduler.lr_warmup_iters, with lr_warmup_fraction=null"
        )
    horizon = scheduler.get("lr_decay_iters") or steps
    if warmup >= horizon:
        horizon = math.ceil(warmup) + 1
        notes.append(
            f"scheduler: the warm-up of {warmup:g} steps is longer than the run of {steps}; the run ends in it"
        )
    final = 0
    if scheduler.lr_decay_style == "WSD":
        left = max(1, math.floor(horizon - warmup))
        final = scheduler.get("lr_wsd_decay_iters") or left
        if final > left:
            notes.append(f"scheduler: the final decay of {final} steps is shortened to {left}, all after the warm-up")
            final = left
    return Schedule(
        style=scheduler.lr_decay_style,
        peak=cfg.optimizer.lr,
        floor=cfg.optimizer.min_lr or 0.0,
        steps=steps,
        warmup=warmup,
        horizon=horizon,
        final=final,
        final_style=scheduler.get("lr_wsd_decay_style") or "linear",
        notes=tuple(notes),
    )
