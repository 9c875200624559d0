"""A sweep, or a run, in a few facts: lines of the terminal, tiles of the page."""

from dataclasses import dataclass

from posttrain.report.comparison import Comparison, format_value
from posttrain.report.trials import Trial, is_number
from posttrain.utils.durations import format_duration

RANKING = {
    "val_loss_after": "validation loss",
    "train_loss": "training loss, since no trial has a validation loss",
}


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
        facts.append(Fact("time", format_duration(comparison.seconds), "of all trials together"))
    if comparison.gpu_hours is not None:
        facts.append(Fact("GPU-hours", f"{comparison.gpu_hours:,.2f}", "time x GPUs of each trial"))
    if comparison.tokens:
        facts.append(Fact("tokens", f"{comparison.tokens:,}", "trained on, padding aside"))
    if best is not None and best.export is not None:
        facts.append(Fact("best export", str(best.export), "linked as best"))
    return facts


def facts_of_run(trial: Trial) -> list[Fact]:
    """State, losses, amounts, speed, memory, machine and export of one run."""
    facts = [Fact("state", trial.state), *_losses(trial)]
    steps = trial.summary.get("steps")
    trained = _last(trial, "loss")
    if not is_number(steps) and trained is not None:
        steps = trained[0]
    epochs = _last(trial, "epoch")
    if is_number(steps):
        facts.append(Fact("steps", f"{steps:,}", f"{format_value(epochs[1])} epochs" if epochs else ""))
    if trial.seconds:
        facts.append(Fact("time", format_duration(trial.seconds), "from start to end"))
    facts += _amounts(trial)
    facts += _machine(trial)
    if trial.export is not None:
        facts.append(Fact("export", str(trial.export)))
    return facts


def _losses(trial: Trial) -> list[Fact]:
    facts = []
    after, before = trial.summary.get("val_loss_after"), trial.summary.get("val_loss_before")
    validated = _last(trial, "val_loss")
    if not is_number(after) and validated is not None:  # it is still running, or ended early
        after = validated[1]
    if is_number(after):
        note = f"{format_value(before)} before training" if is_number(before) else ""
        facts.append(Fact("validation loss", format_value(after), note))
    trained = _last(trial, "loss")
    if trained is not None:
        facts.append(Fact("training loss", format_value(trained[1]), f"at step {trained[0]}"))
    return facts


def _amounts(trial: Trial) -> list[Fact]:
    facts = []
    summary = trial.summary
    if trial.tokens:
        supervised = summary.get("supervised_tokens")
        note = f"{supervised:,} supervised" if is_number(supervised) else ""
        facts.append(Fact("tokens", f"{trial.tokens:,}", note))
    speed, supervised = summary.get("tokens_per_second"), summary.get("supervised_tokens_per_second")
    if is_number(speed):
        note = f"{format_value(supervised)} supervised" if is_number(supervised) else ""
        facts.append(Fact("speed", f"{format_value(speed)} tok/s", note))
    memory, planned = summary.get("peak_memory_gib"), summary.get("memory_planned_gib")
    if is_number(memory):
        note = f"{format_value(planned)} planned" if is_number(planned) else ""
        facts.append(Fact("peak memory", f"{format_value(memory)} GiB", note))
    return facts


def _machine(trial: Trial) -> list[Fact]:
    facts = []
    if trial.gpus is not None:
        where = "CPU"
        if trial.gpus:
            where = "1 GPU" if trial.gpus == 1 else f"{trial.gpus} GPUs"
        facts.append(Fact("machine", where, str(trial.spec.get("precision", ""))))
    model, trained = trial.spec.get("model"), trial.spec.get("trained")
    if isinstance(model, dict) and isinstance(trained, dict):
        total, part = model.get("parameters"), trained.get("parameters")
        if is_number(total) and is_number(part):
            facts.append(Fact("trained", f"{part:,}", f"of {total:,} parameters: {trained.get('kind')}"))
    return facts


def _last(trial: Trial, name: str) -> tuple[int, float] | None:
    """The last point of a curve."""
    points = trial.series.get(name)
    return points[-1] if points else None
