"""A sweep, or a run, in a few facts: lines of the terminal, tiles of the page."""

import shlex
from dataclasses import dataclass

from posttrain.report.comparison import Comparison, format_value
from posttrain.report.trials import Trial, is_number, part_of
from posttrain.utils.durations import format_duration

RANKING = {
    "val_loss_after": "validation loss",
    "train_loss": "training loss, since no trial has a validation loss",
}

# Fact -> the key that it is the value of.
SETTINGS = {"model": "model.path", "data": "data.path", "learning rate": "optimizer.lr"}


@dataclass(frozen=True)
class Fact:
    """One of them.

    Attributes:
        name: what it is about.
        value: the fact.
        note: what it is compared with or made of; may be empty.
    """

    name: str
    value: str
    note: str = ""


def facts_of_sweep(comparison: Comparison) -> list[Fact]:
    """Best result, states, time and tokens of all trials."""
    facts = []
    best = comparison.best
    if best is not None:
        value = format_value(best.summary[comparison.metric])
        facts.append(Fact("best", value, f"{RANKING[comparison.metric]}; {comparison.names[best.name]}"))
    states = ", ".join(f"{count} {state}" for state, count in comparison.states.items())
    facts.append(Fact("trials", str(len(comparison.trials)), states))
    if comparison.seconds:
        facts.append(Fact("time", format_duration(comparison.seconds), "of all trials together, from start to end"))
    if comparison.gpu_hours is not None:
        facts.append(Fact("GPU-hours", f"{comparison.gpu_hours:,.2f}", "time x GPUs of each trial"))
    if comparison.tokens:
        facts.append(Fact("tokens", f"{comparison.tokens:,}", "trained on, padding aside"))
    if best is not None and best.export is not None:
        facts.append(Fact("best export", str(best.export), "linked as best"))
    if best is not None and best.overrides:
        again = shlex.join(["python", "-m", "posttrain", "--rerun", str(best.path)])
        facts.append(Fact("best again", again, "KEY=VALUE behind it changes a setting"))
    return facts


def facts_of_run(trial: Trial) -> list[Fact]:
    """State, losses, amounts, speed, memory, machine and export of one run."""
    facts = [Fact("state", trial.state), *_settings(trial), *_losses(trial)]
    steps = trial.summary.get("steps")
    trained = trial.last("loss")
    if not is_number(steps) and trained is not None:
        steps = trained[0]
    if is_number(steps):
        note = ""
        epochs = trial.last("epoch")
        if epochs is not None:
            note = f"{format_value(epochs[1])} epochs"
        facts.append(Fact("steps", f"{steps:,}", note))
    if trial.seconds:
        facts.append(Fact("time", format_duration(trial.seconds), "from start to end"))
    facts += _amounts(trial)
    facts += _machine(trial)
    if trial.export is not None:
        facts.append(Fact("export", str(trial.export)))
    return facts


def _settings(trial: Trial) -> list[Fact]:
    """What was trained on what, and how fast weights moved."""
    facts = []
    if trial.file is not None:
        facts.append(Fact("run file", trial.file))
    for name, key in SETTINGS.items():
        value = trial.config.get(key)
        if value is not None:
            facts.append(Fact(name, format_value(value)))
    return facts


def _losses(trial: Trial) -> list[Fact]:
    facts = []
    after = trial.summary.get("val_loss_after")
    validated = trial.last("val_loss")
    if not is_number(after) and validated is not None:  # it is still running, or ended early
        after = validated[1]
    if is_number(after):
        before = _amount(trial, "val_loss_before", "before training")
        facts.append(Fact("validation loss", format_value(after), before))
    trained = trial.last("loss")
    if trained is not None:
        facts.append(Fact("training loss", format_value(trained[1]), f"at step {trained[0]}"))
    return facts


def _amounts(trial: Trial) -> list[Fact]:
    facts = []
    if trial.tokens:
        facts.append(Fact("tokens", f"{trial.tokens:,}", _amount(trial, "supervised_tokens", "supervised")))
    speed = _amount(trial, "tokens_per_second", "tok/s")
    if speed:
        facts.append(Fact("speed", speed, _amount(trial, "supervised_tokens_per_second", "supervised")))
    memory = _amount(trial, "peak_memory_gib", "GiB")
    if memory:
        facts.append(Fact("peak memory", memory, _amount(trial, "memory_planned_gib", "planned")))
    return facts


def _amount(trial: Trial, name: str, unit: str) -> str:
    """A number of the summary with a word behind it, empty where there is none."""
    value = trial.summary.get(name)
    if not is_number(value):
        return ""
    return f"{format_value(value)} {unit}"


def _machine(trial: Trial) -> list[Fact]:
    facts = []
    if trial.gpus is not None:
        where = {0: "CPU", 1: "1 GPU"}.get(trial.gpus, f"{trial.gpus} GPUs")
        facts.append(Fact("machine", where, str(trial.spec.get("precision", ""))))
    trained = part_of(trial.spec, "trained")
    total, part = part_of(trial.spec, "model").get("parameters"), trained.get("parameters")
    if is_number(total) and is_number(part):
        facts.append(Fact("trained", f"{part:,}", f"of {total:,} parameters: {trained.get('kind')}"))
    return facts
