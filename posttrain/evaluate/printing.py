"""Print the result on the terminal."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from posttrain.utils.consoles import Console
from posttrain.utils.durations import format_duration


def print_result(result: dict[str, Any]) -> None:
    """Print the table of losses and scores, the rows that were left out, and lm-eval's tasks."""
    console = Console()
    if result["datasets"]:
        console.print(_loss_table(result))
    for name, part in result["datasets"].items():
        rows = part["rows"]
        if rows["dropped"] or rows["truncated"]:
            reasons = [f"{count} {reason}" for reason, count in rows["dropped"].items()]
            dropped = ", ".join(reasons) or "none"
            console.print(f"{escape(name)}: {rows['truncated']} truncated; dropped: {escape(dropped)}")
        if "generated_tokens" in part:
            console.print(
                f"{escape(name)}: {part['answers']:,} answers of {part['generated_tokens']:,} tokens in "
                f"{format_duration(part['seconds']['generating'])}, {part['tokens_per_second']:,.1f} a second"
            )
    if result.get("lm_eval"):
        console.print(_task_table(result["lm_eval"]))


def _loss_table(result: dict[str, Any]) -> Table:
    """A line for each set, followed by one for each of its sources and categories."""
    sets = result["datasets"]
    with_scores = any("score" in part for part in sets.values())
    headings = ["set", "loss", "perplexity"]
    if with_scores:
        headings += ["score", "answers"]
    headings += ["chats", "supervised"]
    table = Table(*headings, title=escape(result["model"]), box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for name, part in sets.items():
        table.add_row(*_cells(f"{name}, {part['split']}", part, with_scores), style="bold")
        for label, values in part.get("sources", {}).items():
            table.add_row(*_cells(f"  source {label}", values, with_scores))
        for label, values in part.get("categories", {}).items():
            table.add_row(*_cells(f"  {label}", values, with_scores))
    if "all" in result:
        table.add_row(*_cells("all sets", result["all"], with_scores), style="bold")
    return table


def _cells(name: str, values: dict[str, Any], with_scores: bool) -> list[str]:
    cells = [escape(name), f"{values['loss']:.4f}", f"{values['perplexity']:.4g}"]
    if with_scores:
        score = values.get("score")
        cells.append("" if score is None else f"{score:.4f}")
        cells.append(f"{values.get('answers', 0):,}")
    cells.append(f"{values['conversations']:,}")
    cells.append(f"{values['supervised_tokens']:,}")
    return cells


def _task_table(tasks: dict[str, dict[str, Any]]) -> Table:
    table = Table("task", "metric", "value", "questions", title="lm-eval", box=box.SIMPLE)
    for task, values in tasks.items():
        for key, value in values.items():
            if key != "samples":
                table.add_row(escape(task), escape(key), f"{value:.4f}", str(values["samples"]))
    return table
