"""What the person at the terminal sees; everything else a rank prints goes to its log file."""

import os
import shlex
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from posttrain.utils import stop
from posttrain.utils.escape import escape_control
from posttrain.utils.rank_environment import UI_FD

PLAIN_INTERVAL_S = 10.0  # between lines where the output is not a terminal


def shown(text: str | None) -> str:
    """Text from outside as it may be drawn: no control character acts, no bracket is markup."""
    return escape(escape_control(text or ""))


class Screen:
    """The launcher's standard output.

    Args:
        file: where to draw.
    """

    def __init__(self, file: TextIO) -> None:
        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.progress: Progress | None = None
        self.last_line = 0.0

    @classmethod
    def inherited(cls) -> "Screen":
        """The screen that the launcher passed on, else this process's standard output."""
        descriptor = os.environ.get(UI_FD)
        return cls(stop.tolerant_stream(int(descriptor)) if descriptor else sys.stdout)

    def print(self, text: str) -> None:
        """A line that stays, above the progress line; rich markup."""
        (self.progress.console if self.progress else self.console).print(text)

    def start(self, step: int, steps: int) -> None:
        """Begin the progress line at `step` of `steps`."""
        self.steps = steps
        if self.live:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self.task = self.progress.add_task("", total=steps, completed=step)
            self.progress.start()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Move the progress line, or print one now and then."""
        parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
        if values.get("grad_norm") is not None:
            parts.append(f"norm {values['grad_norm']:.2f}")
        supervised = values["supervised_tokens_per_second"]
        parts.append(f"{supervised:,.0f} supervised tok/s of {values['tokens_per_second']:,.0f}")
        if values.get("mfu") is not None:
            parts.append(f"MFU {values['mfu']:.0%}")
        text = "  ".join(parts)
        if self.progress:
            self.progress.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last_line > PLAIN_INTERVAL_S or step == self.steps:
            self.last_line = time.monotonic()
            eta = (self.steps - step) * values["step_seconds"]
            self.print(f"step {step}/{self.steps}  {text}  eta {eta:.0f} s")

    def stop(self) -> None:
        """End the progress line."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def result(self, summary: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Samples side by side, losses, and where everything is."""
        if samples:
            table = Table(title="Sample answers", show_lines=True)
            for name in ("prompt", "before", "after", "reference"):
                table.add_column(name, overflow="fold")
            for sample in samples:
                prompt = _tail(sample["prompt"])
                answers = map(sample.get, ("before", "after", "reference"))
                table.add_row(*map(shown, (prompt, *answers)))
            self.console.print(table, soft_wrap=False)
        if summary.get("profile"):
            table = Table(title="Milliseconds per step")
            for name, value in summary["profile"].items():
                table.add_row(name, f"{value:.2f}")
            self.console.print(table)
        before, after = summary.get("val_loss_before"), summary.get("val_loss_after")
        if after is not None:
            line = f"validation loss [bold]{after:.4f}[/]"
            if before is not None:
                line = f"validation loss {before:.4f} -> [bold]{after:.4f}[/]"
            self.print(line)
        if summary.get("supervised_tokens_per_second"):
            line = (
                f"{summary['supervised_tokens']:,} supervised tokens, {summary['supervised_tokens_per_second']:,.0f} "
                f"per second; peak memory {summary['peak_memory_gib']:.1f} GiB"
            )
            if "time_to_first_step_s" in summary:  # absent if the run was already complete when restarted
                line += f"; first step after {summary['time_to_first_step_s']:.0f} s"
            self.print(line)
        self.print(f"run directory: {shown(summary['run_dir'])}")
        if summary.get("export"):
            self.print(f"export: {shown(summary['export'])}")
            self.print(f"ask it: python -m posttrain.generate {shown(shlex.quote(summary['run_dir']))} 'your question'")


def _tail(prompt: str, most: int = 240) -> str:
    """The end of a prompt, where the question is, without the role that the answer starts with."""
    lines = [""]
    lines += filter(str.strip, prompt.splitlines())
    if len(lines) > 2 and len(lines[-1]) < 12:  # "assistant", "model"
        lines.pop()
    text = lines[-1]
    return text if len(text) <= most else "..." + text[-most:]
