"""Whether training ends because the validation loss no longer falls; no torch here.

The definition is that of Transformers' EarlyStoppingCallback with a metric of which less is better: a loss that isn't
lower than the lowest before by more than the threshold counts as stale, NaN does too, and the first one never does.
"""

import math
from collections.abc import Sequence

Validation = tuple[int, float]  # step, loss


def stale_validations(losses: Sequence[float], min_delta: float) -> int:
    """How many of the last losses in a row are no improvement.

    Args:
        losses: of all validations during training, in order.
        min_delta: a lower loss is an improvement if it is lower by more than this.
    """
    stale = 0
    lowest = math.inf
    for number, loss in enumerate(losses):
        improved = number == 0 or (loss < lowest and lowest - loss > min_delta)
        stale = 0 if improved else stale + 1
        if loss < lowest:
            lowest = loss
    return stale


def lowest(validations: Sequence[Validation]) -> Validation | None:
    """The validation with the lowest loss, the first of equal ones; None: there is none, or none but NaN."""
    finite = [one for one in validations if math.isfinite(one[1])]
    return min(finite, key=lambda one: one[1], default=None)


def verdict(validations: Sequence[Validation], patience: int | None, min_delta: float) -> str | None:
    """Why training should end, after the last of `validations` or later; None: it should continue.

    Args:
        validations: of all validations during training, in order.
        patience: stale ones in a row after which it ends; None: never.
        min_delta: see `stale_validations`.
    """
    stale = stale_validations([loss for _, loss in validations], min_delta)
    if patience is None or stale < patience:
        return None
    best = lowest(validations)
    margin = f" by more than {min_delta:g}" if min_delta else ""
    text = f"no new lowest validation loss{margin} in {stale} validation{'s' * (stale > 1)}"
    if best is not None:
        text += f"; the lowest, {best[1]:.4f}, was after step {best[0]}"
    return text
