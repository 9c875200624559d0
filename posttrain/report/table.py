"""A report on the terminal: a table of trials, or the facts of one run."""

import re
from dataclasses import dataclass, replace

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from posttrain.report.comparison import NUMBERS, Comparison, format_setting, format_value, setting
from posttrain.report.facts import Fact, facts_of_run, facts_of_sweep
from posttrain.report.trials import Trial
from posttrain.utils.consoles import Console
from posttrain.utils.escape import escape_control, shorten, shorten_front

STYLE = {
    "finished": "green",
    "running": "cyan",
    "queued": "cyan",
    "failed": "red",
    "stopped": "yellow",
    "killed": "yellow",
    "pruned": "yellow",
    "damaged": "red",
    "unknown": "dim",
}
OTHERS = "\nmade or validated with other files, ranked by themselves:"
# Columns beside the one that ranks, as far as the terminal is wide; the page has all.
OPTIONAL = ("train_loss", "tokens_per_second", "peak_memory_gib", "train_seconds")
WIDEST = 24  # characters of a value, or of a name, in a column
WIDEST_HEADING = 9  # characters of a line of a heading
KEYS_BESIDE_NAMES = 2  # that are missed more than the trials' names
MOST_ROWS = 40
LONGEST_ERROR = 300


def print_table(comparison: Comparison, console: Console | None = None) -> None:
    """Print the trials, best first, with what was swept; what went wrong and the facts below.

    Those that can't be compared with the latest have tables of their own.
    """
    console = console or Console(highlight=False)
    columns = _columns(comparison, console)
    for group in range(1 + max((trial.group for trial in comparison.trials), default=0)):
        if group:
            console.print(OTHERS)
        trials = [trial for trial in comparison.trials if trial.group == group]
        console.print(_table(comparison, trials[:MOST_ROWS], columns))
        if len(trials) > MOST_ROWS:
            console.print(f"and {len(trials) - MOST_ROWS} more, which the page shows")
    _print_what_has_no_column(comparison, columns, console)
    _print_errors(comparison, console)
    _print_facts(facts_of_sweep(comparison), console)


@dataclass(frozen=True)
class Columns:
    """What the terminal has room for beside the rank and the state.

    Attributes:
        named: whether the trials' names are a column.
        keys: that are columns.
        losses: the number that ranks, and the training loss where a trial has no other.
        optional: numbers beside them.
    """

    named: bool
    keys: tuple[str, ...]
    losses: tuple[str, ...]
    optional: tuple[str, ...]

    def fewer(self) -> "Columns | None":
        """Without the one that is missed least; None: there is none."""
        if self.optional:
            return replace(self, optional=self.optional[:-1])
        if self.named and len(self.keys) <= KEYS_BESIDE_NAMES:
            return replace(self, named=False)
        if self.keys:
            return replace(self, keys=self.keys[:-1])
        return None


def _columns(comparison: Comparison, console: Console) -> Columns:
    """As many columns as fit."""
    losses = [comparison.metric]
    for trial in comparison.trials:
        if "train_loss" not in losses and _result(trial, comparison.metric) is None and trial.last("loss"):
            losses.append("train_loss")
    optional = [name for name in OPTIONAL if name in comparison.numbers and name not in losses]
    keys = [key for key in comparison.keys if all(len(_value(trial, key)) <= WIDEST for trial in comparison.trials)]
    columns = Columns(not comparison.columns_say_names, tuple(keys), tuple(losses), tuple(optional))
    while _width(_table(comparison, comparison.trials, columns), console) > console.width:
        fewer = columns.fewer()
        if fewer is None:
            break
        columns = fewer
    return columns


def print_run(trial: Trial, console: Console | None = None) -> None:
    """Print the facts of one run."""
    console = console or Console(highlight=False)
    if trial.error:
        console.print(Text(escape_control(trial.error), style=STYLE.get(trial.state, "")))
    _print_facts(facts_of_run(trial), console)


def _table(comparison: Comparison, trials: list[Trial], columns: Columns) -> Table:
    """Some trials with their ranks among all.

    Args:
        comparison: of all trials.
        trials: that are shown.
        columns: that there are.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    if columns.named:
        table.add_column("trial", no_wrap=True)
    for key in columns.keys:
        table.add_column(Text(escape_control(_broken(comparison.labels[key]))), justify="right", no_wrap=True)
    shown = [*columns.losses, *columns.optional]
    for name in shown:
        style = "bold" if name == comparison.metric else None
        table.add_column(_broken(NUMBERS[name]), justify="right", no_wrap=True, style=style)
    table.add_column("status", no_wrap=True)
    for trial in trials:
        number = comparison.trials.index(trial) + 1
        cells = [f"* {number}" if trial is comparison.best else str(number)]
        if columns.named:
            cells.append(shorten_front(comparison.names[trial.name], WIDEST))
        cells += [_value(trial, key) for key in columns.keys]
        cells += [format_value(_result(trial, name)) for name in shown]
        state = Text(escape_control(trial.state), style=STYLE.get(trial.state, ""))
        table.add_row(*(Text(escape_control(cell)) for cell in cells), state)
    return table


def _value(trial: Trial, key: str) -> str:
    """A trial's value of a key; empty where it has no configuration."""
    return format_setting(setting(trial, key)) if trial.config else ""


def _result(trial: Trial, name: str) -> object:
    """A number of a trial's summary; its training loss is the last logged one as long as it has no summary."""
    last = trial.last("loss")
    if name == "train_loss" and not trial.summary and last is not None:
        return last[1]
    return trial.summary.get(name)


def _print_what_has_no_column(comparison: Comparison, columns: Columns, console: Console) -> None:
    """The trials' names, and values of keys, as far as the table lacks or shortens them: a line each, to be copied."""
    lines = []
    for number, trial in enumerate(comparison.trials[:MOST_ROWS], 1):
        name = comparison.names[trial.name]
        parts = []
        if not comparison.columns_say_names and (not columns.named or len(name) > WIDEST):
            parts.append(name)
        for key in comparison.keys:
            if key not in columns.keys:
                parts.append(f"{comparison.labels[key]}={_value(trial, key)}")
        if parts:
            lines.append(f"{number:>3}  {'  '.join(parts)}")
    if lines:
        console.print()
    for line in lines:
        console.print(Text(escape_control(line)), soft_wrap=True)


def _width(table: Table, console: Console) -> int:
    """The columns that a table would take on a terminal of any width."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _broken(heading: str) -> str:
    """A long heading in lines that end behind a word: a column is as narrow as its values then."""
    lines = [""]
    for part in re.split(r"(?<=[_ ])", heading):
        if lines[-1] and len(lines[-1]) + len(part) > WIDEST_HEADING:
            lines.append("")
        lines[-1] += part
    return "\n".join(map(str.strip, lines))


def _print_errors(comparison: Comparison, console: Console) -> None:
    if comparison.errors:
        console.print()
    for (state, error), ranks in comparison.errors.items():
        text = f"{comparison.which(ranks)}: {shorten(error, LONGEST_ERROR)}"
        console.print(Text(escape_control(text), style=STYLE.get(state, "")))


def _print_facts(facts: list[Fact], console: Console) -> None:
    """A line each, which the terminal may wrap: a path is copied whole."""
    widest = max(len(fact.name) for fact in facts)
    console.print()
    for fact in facts:
        text = f"{fact.value}  ({fact.note})" if fact.note else fact.value
        name = Text(f"{fact.name:<{widest}}  ", style="dim")
        console.print(name + Text(escape_control(text)), soft_wrap=True)
