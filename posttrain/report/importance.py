"""How much each swept key matters: what a forest of regression trees loses when the key's values are shuffled."""

import math
from dataclasses import dataclass, field

from posttrain.report.comparison import Comparison, format_setting, setting
from posttrain.report.scales import is_logarithmic, is_quantity
from posttrain.report.trials import Trial
from posttrain.utils import working

FEWEST_TRIALS = 8  # below, any pattern may be chance
LEAST_EXPLAINED = 0.25  # of the variance between trials; the forest of eight trials of pure noise may reach 0.2
TREES = 60
SHUFFLES = 10


@dataclass(frozen=True)
class Importance:
    """Shares of the swept keys in what a forest knows about the ranking metric.

    Attributes:
        shares: key -> share, the largest first; they add up to 1. Empty where they can't be told.
        explained: R^2 on trials that a tree has not seen.
        trials: how many the forest is of.
        skipped: why there are no shares; empty where there are.
    """

    shares: dict[str, float] = field(default_factory=dict)
    explained: float = 0.0
    trials: int = 0
    skipped: str = ""


def parameter_importance(comparison: Comparison) -> Importance:
    """Permutation importance (Breiman 2001, Random Forests, section 10) of the swept keys for the ranking metric."""
    trials = comparison.scored
    if not comparison.keys:
        return Importance(skipped="nothing was swept")
    if len(trials) < FEWEST_TRIALS:
        return Importance(skipped=f"it takes {FEWEST_TRIALS} trials with a result, here are {len(trials)}")
    try:
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.inspection import permutation_importance
    except ModuleNotFoundError:
        return Importance(skipped="it takes scikit-learn, which is not installed; run `uv sync --extra sweep`")
    working.phase("computing what matters")
    columns = [encode(key, trials) for key in comparison.keys]
    rows = list(zip(*columns, strict=True))
    scores = [trial.score(comparison.metric) for trial in trials]
    if len(set(scores)) == 1:
        return Importance(skipped="all trials have the same result")
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(rows, scores)
    explained = float(forest.oob_score_)
    if explained < LEAST_EXPLAINED:
        return Importance(
            skipped="the results don't follow from the swept values: a forest that is trained on some of the trials "
            f"doesn't predict the others (R^2 {explained:.2f})"
        )
    found = permutation_importance(forest, rows, scores, n_repeats=SHUFFLES, random_state=0)
    losses = {key: max(0.0, float(mean)) for key, mean in zip(comparison.keys, found.importances_mean, strict=True)}
    total = sum(losses.values())
    shares = {key: losses[key] / total for key in sorted(losses, key=losses.__getitem__, reverse=True)}
    return Importance(shares, explained, len(trials))


def encode(key: str, trials: list[Trial]) -> list[float]:
    """A key's values as numbers: their logarithms where they span magnitudes, of texts the place in the alphabet."""
    values = [setting(trial, key) for trial in trials]
    if all(map(is_quantity, values)):
        numbers = list(map(float, values))
        if is_logarithmic(numbers):
            return list(map(math.log, numbers))
        return numbers
    texts = list(map(format_setting, values))
    alphabet = sorted(set(texts))
    return [float(alphabet.index(text)) for text in texts]
