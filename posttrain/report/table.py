"""A report on the terminal: a table of trials, or the facts of one run."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from posttrain.report.comparison import NUMBERS, Comparison, format_setting, format_value, setting
from posttrain.report.facts import Fact, facts_of_run, facts_of_sweep
from posttrain.report.trials import Trial
from posttrain.utils.escape import escape_control, shorten

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
WIDEST = 18  # characters of a swept value
WIDEST_NAME = 24
MOST_ROWS = 40
LONGEST_ERROR = 300


def print_table(comparison: Comparison, console: Console | None = None) -> None:
    """Print the trials, best first, with what was swept; what went wrong and the facts below.

    Those that can't be compared with the latest have tables of their own.
    """
    console = console or Console(highlight=False)
    optional = [name for name in OPTIONAL if name in comparison.other_numbers]
    keys = list(comparison.keys)
    while _width(_table(comparison, comparison.trials, keys, optional), console) > console.width:
        if not optional and len(keys) < 2:
            break
        (optional or keys).pop()
    for group in range(1 + max((trial.group for trial in comparison.trials), default=0)):
        if group:
            console.print(OTHERS)
        trials = [trial for trial in comparison.trials if trial.group == group]
        console.print(_table(comparison, trials[:MOST_ROWS], keys, optional))
        if len(trials) > MOST_ROWS:
            console.print(f"and {len(trials) - MOST_ROWS} more, which the page shows")
    if len(keys) < len(comparison.keys):
        console.print(f"and {len(comparison.keys) - len(keys)} more swept keys, which the page shows")
    _print_errors(comparison, console)
    _print_facts(facts_of_sweep(comparison), console)


def print_run(trial: Trial, console: Console | None = None) -> None:
    """Print the facts of one run."""
    console = console or Console(highlight=False)
    if trial.error:
        console.print(Text(escape_control(trial.error), style=STYLE.get(trial.state, "")))
    _print_facts(facts_of_run(trial), console)


def _table(comparison: Comparison, trials: list[Trial], keys: Sequence[str], optional: Sequence[str]) -> Table:
    """Some trials with their ranks among all.

    Args:
        comparison: of all trials.
        trials: that are shown.
        keys: swept ones that are columns.
        optional: numbers that are columns beside the one that ranks.
    """
    named = not comparison.columns_say_names
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    if named:
        table.add_column("trial", overflow="fold", min_width=8, max_width=WIDEST_NAME)
    for key in keys:
        table.add_column(Text(escape_control(_broken(comparison.labels[key]))), justify="right", no_wrap=True)
    shown = [comparison.metric, *optional]
    for name in shown:
        style = "bold" if name == comparison.metric else None
        table.add_column(NUMBERS[name], justify="right", no_wrap=True, style=style)
    table.add_column("status", no_wrap=True)
    for trial in trials:
        number = comparison.trials.index(trial) + 1
        cells = [f"* {number}" if trial is comparison.best else str(number)]
        if named:
            cells.append(comparison.names[trial.name])
        cells += [shorten(format_setting(setting(trial, key)), WIDEST) if trial.config else "" for key in keys]
        cells += [format_value(trial.summary.get(name)) for name in shown]
        state = Text(escape_control(trial.state), style=STYLE.get(trial.state, ""))
        table.add_row(*(Text(escape_control(cell)) for cell in cells), state)
    return table


def _width(table: Table, console: Console) -> int:
    """The columns that a table would take on a terminal of any width."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _broken(label: str) -> str:
    """A long label in lines that end behind an underscore: a column is as narrow as its values then."""
    lines = [""]
    for part in label.replace("_", "_ ").split(" "):
        if lines[-1] and len(lines[-1]) + len(part) > WIDEST // 2:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


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
