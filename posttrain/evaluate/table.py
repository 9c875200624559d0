"""The result on the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show(result: dict[str, Any], console: Console) -> None:
    """Print a line for each set, and below it for its categories and sources; then lm-eval's tasks."""
    sets = result["sets"]
    if sets:
        scored = any("score" in part for part in sets.values())
        table = Table("set", "loss", "perplexity", *(["score", "answers"] if scored else []), "chats", "trained",
                      title=escape(result["model"]), box=box.SIMPLE)  # fmt: skip
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for name, part in sets.items():
            _row(table, f"{name}, {part['split']}", part, scored, "bold")
            for kind in ("sources", "categories"):
                for label, values in part.get(kind, {}).items():
                    _row(table, f"  source {label}" if kind == "sources" else f"  {label}", values, scored)
        if "all" in result:
            _row(table, "all sets", result["all"], scored, "bold")
        console.print(table)
    for name, part in sets.items():
        rows = part["rows"]
        if rows["dropped"] or rows["truncated"]:
            left_out = ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items()) or "none"
            console.print(f"{escape(name)}: {rows['truncated']} truncated; left out: {escape(left_out)}")
    if result.get("lm_eval"):
        table = Table("task", "metric", "value", "questions", title="lm-eval", box=box.SIMPLE)
        for task, values in result["lm_eval"].items():
            for key, value in values.items():
                if key != "samples":
                    table.add_row(escape(task), escape(key), f"{value:.4f}", str(values["samples"]))
        console.print(table)


def _row(table: Table, name: str, part: dict[str, Any], scored: bool, style: str | None = None) -> None:
    score = []
    if scored:
        given = part.get("score")
        score = ["" if given is None else f"{given:.4f}", f"{part.get('answers', 0):,}"]
    table.add_row(
        escape(name), f"{part['loss']:.4f}", f"{part['perplexity']:.4g}", *score, f"{part['conversations']:,}",
        f"{part['trained_tokens']:,}", style=style,
    )  # fmt: skip
