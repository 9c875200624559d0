"""The trials as a table in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.config.trial_names import short
from posttrain.report.trials import Trial, best_trial, differing, ranked_by
from posttrain.utils.escape import escape_control

STYLE = {
    "finished": "green",
    "running": "cyan",
    "queued": "cyan",
    "failed": "red",
    "stopped": "yellow",
    "pruned": "yellow",
    "damaged": "red",
    "unknown": "dim",
}
# summary.json's key -> heading. All are columns of the page, some of the terminal's table.
NUMBERS = {
    "val_loss_before": "val before",
    "val_loss_after": "val loss",
    "train_loss": "train loss",
    "tokens_per_second": "tok/s",
    "supervised_tokens_per_second": "supervised tok/s",
    "peak_memory_gib": "GiB",
    "train_seconds": "seconds",
}
TERMINAL = ("val_loss_after", "train_loss", "tokens_per_second", "peak_memory_gib")
OTHERS = "\nmade or validated with other files, ranked by themselves:"
MOST_KEYS = 6  # differing keys shown as columns: a terminal is not wider


def print_table(trials: list[Trial], console: Console | None = None) -> None:
    """Print the trials, best first, with what differs between them; errors below.

    Those that can't be compared with the latest have tables of their own.
    """
    console = console or Console()
    for group in range(1 + max((trial.group for trial in trials), default=0)):
        if group:
            console.print(OTHERS)
        console.print(_table([trial for trial in trials if trial.group == group], trials))
    for trial in trials:
        if trial.error:
            style = STYLE.get(trial.state, "")
            console.print(Text(escape_control(f"{trial.name}: {trial.error}"), style=style))


def _table(trials: list[Trial], all_trials: list[Trial]) -> Table:
    """One group's table, with the columns of all."""
    keys = columns(all_trials)
    best = best_trial(all_trials)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("trial", overflow="fold", min_width=10)
    for key in keys:
        table.add_column(Text(escape_control(short(key, keys))), justify="right", overflow="fold")
    shown = [name for name in numbers_of(all_trials) if name in TERMINAL]
    for name in shown:
        style = "bold" if name == ranked_by(all_trials) else None
        table.add_column(NUMBERS[name], justify="right", no_wrap=True, style=style)
    table.add_column("status", no_wrap=True)
    for trial in trials:
        mark = "*" if trial is best else " "
        cells = [f"{mark} {trial.name}"]
        cells += map(format_value, map(trial.config.get, keys))
        cells += map(format_value, map(trial.summary.get, shown))
        state = Text(escape_control(trial.state), style=STYLE.get(trial.state, ""))
        table.add_row(*(Text(escape_control(cell)) for cell in cells), state)
    return table


def columns(trials: list[Trial]) -> list[str]:
    """The differing keys worth a column, those of the command lines first and in their order."""
    different = dict.fromkeys(differing(trials))
    keys: dict[str, None] = {}
    for trial in trials:
        for override in trial.overrides or ():
            key = override.lstrip("+~").partition("=")[0]
            if key in different:
                keys[key] = None
    return list(keys | different)[:MOST_KEYS]


def numbers_of(trials: list[Trial]) -> list[str]:
    """The keys of NUMBERS that any of the trials has."""
    return [name for name in NUMBERS if any(name in trial.summary for trial in trials)]


def format_value(value: object) -> str:
    """The text of a cell: floats with four significant digits, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if 10_000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"
