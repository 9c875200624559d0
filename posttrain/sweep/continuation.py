"""A sweep that was told to stop: what is done of it, and the command that does the rest."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from posttrain.config.overrides import format_value
from posttrain.sweep.trial import Trial
from posttrain.utils import rundir
from posttrain.utils.command_line import typed_command
from posttrain.utils.escape import escape_control

FINISHED, FAILED, BEGUN, ABSENT = "finished", "failed", "interrupted", "not begun"
ENDS = {"finished": FINISHED, "pruned": FINISHED, "failed": FAILED}  # by the state of a trial's status.json


def describe_progress(trials: Sequence[Trial], total: int, begun: str = BEGUN) -> str:
    """How many trials have finished, failed and begun: `2 of 9 trials finished, 1 interrupted, 6 not begun`.

    Args:
        trials: that have been proposed.
        total: of the whole sweep.
        begun: what those are called that have begun and not come to an end.
    """
    counts: Counter[str] = Counter()
    for trial in trials:
        status = {}
        if trial.directory.is_dir():
            status = rundir.object_if_any(trial.directory, "status.json")
        if status:
            counts[ENDS.get(str(status.get("state")), begun)] += 1
    counts[ABSENT] = total - counts.total()
    parts = [f"{counts[FINISHED]} of {total} trials finished"]
    for name in (FAILED, begun, ABSENT):
        if counts[name]:
            parts.append(f"{counts[name]} {name}")
    return ", ".join(parts)


def how_to_continue(config: DictConfig, directory: Path) -> str:
    """The command that continues a sweep, or why there is none.

    Args:
        config: of the sweep, composed with `hydra`.
        directory: of the sweep.
    """
    sampler = config.hydra.sweeper.get("sampler")
    if isinstance(sampler, DictConfig) and "seed" in sampler and sampler.seed is None:
        resume = f"python -m posttrain --resume {shlex.quote(str(directory))}/TRIAL"
        return (
            "hydra.sweeper.sampler.seed=null: without a seed the same command would propose other trials; an "
            f"interrupted one continues alone: {escape_control(resume)}"
        )
    return f"to continue: {typed_command(_changed(config, directory))}"


def _changed(config: DictConfig, directory: Path) -> dict[str, str]:
    """What the command that continues has to say otherwise than the one that began."""
    changed = {}
    if config.run.resume == "never":  # refuses a trial that was interrupted
        changed["run.resume"] = "auto"
    if "${now:" in OmegaConf.to_yaml(config.hydra.sweep) + OmegaConf.to_yaml(config.sweep):
        changed["hydra.sweep.dir"] = format_value(str(directory))
    return changed
