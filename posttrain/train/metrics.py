"""The numbers of a run: metrics.jsonl, the trackers, and the line on the terminal. First rank only."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config.containers import as_dict
from posttrain.plan.flops import ModelFlops
from posttrain.train.batches import Counts
from posttrain.train.console import shown
from posttrain.train.context import RunContext
from posttrain.train.trackers import Resumed, TrackedRun
from posttrain.train.trackers.tracker import sweep_of
from posttrain.utils import rundir
from posttrain.utils.atomic_files import finite
from posttrain.utils.mappings import without_none

# Columns about speed; others are about the training.
PERFORMANCE = (
    "tokens_per_second",
    "supervised_tokens_per_second",
    "padding",
    "data_wait",
    "mfu",
    "mfu_all_logits",
    "step_seconds",
    "memory_gib",
)
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Metrics:
    """Takes each logged step and hands it to every place that records it.

    Args:
        run: the run.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.trackers = run.groups.trackers
        self.screen = run.screen

    def start(self, first_step: int, last_step: int, flops: ModelFlops, planned: float | None) -> None:
        """Announce the run and start the trackers.

        Args:
            first_step: after which it starts.
            last_step: after which it will end; the same if it had ended when it was started again.
            flops: of a step.
            planned: peak memory, GiB; None: not known.
        """
        run = self.run
        self.flops = flops
        self.last_seconds = run.progress.seconds
        self.last_step = first_step
        rundir.remove(run.run_dir, "summary.json")  # left over from a pruned trial that is being resumed
        ended = first_step == last_step
        kept = self.keep(METRICS, first_step, ended)
        samples = self.keep(SAMPLES, first_step, ended)
        self.file = os.fdopen(rundir.append(run.run_dir, METRICS), "a", encoding="utf-8")
        name = run.config.run.name or run.run_dir.name
        config = as_dict(run.config)
        resumed = None
        if first_step:
            resumed = Resumed(first_step, points_at(first_step, kept), answers_at(first_step, samples))
        group, swept = sweep_of(run.run_dir)
        tracked_run = TrackedRun(run.run_dir, name, config, group, swept, resumed)
        for tracker in self.trackers:
            tracker.start(tracked_run)
            if tracker.notice:
                self.screen.print(shown(tracker.notice))
        for line in describe(run):
            self.screen.print(line)
        if planned is not None:
            self.screen.print(f"planned peak memory {planned:.1f} GiB per GPU")
        for line in run.progress.skipped:
            self.screen.print(f"skipped {shown(line)}")
        self.record_rollback(first_step, kept)
        if first_step:
            self.screen.print(f"resuming after step {first_step}")
        if first_step < last_step:
            self.screen.print("how long it takes is known after a step: its line ends with the time left (eta)")
        self.screen.start(first_step, last_step)

    def record_rollback(self, first_step: int, kept: str) -> None:
        """Write that the run was rolled back to `first_step`, unless the lines kept say so already."""
        rollbacks = self.run.progress.rollbacks
        if not rollbacks or rollbacks[-1]["to"] != first_step:
            return
        step = rollbacks[-1]["step"]
        if f'"rolled_back_from": {step},' not in kept:
            self.write(first_step, {"rolled_back_from": step}, why=rollbacks[-1]["why"])

    def keep(self, name: str, first_step: int, ended: bool) -> str:
        """Leave in a file of lines what an earlier process has written up to `first_step`; returns that."""
        run_dir = self.run.run_dir
        if not rundir.is_file(run_dir, name):
            return ""
        text = rundir.read_text(run_dir, name, rundir.LONG, errors="replace")  # a line may be cut within a character
        text = kept_lines(text, first_step, ended)
        rundir.write_text(run_dir, name, text)
        return text

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        lr: float | None,
        grad_norm: float | None,
        counts: Counts,
        epoch: float,
        memory_gib: float,
    ) -> None:
        """Record a logged step.

        Args:
            step: that has ended.
            metrics: the objective's, by column, as means over the steps since the last logged one.
            lr: its learning rate.
            grad_norm: before clipping.
            counts: over all processes, since the last logged step.
            epoch: passes over the training rows so far.
            memory_gib: the most that this process has held.
        """
        seconds = self.run.progress.seconds
        took = seconds - self.last_seconds
        steps = step - self.last_step
        self.last_seconds = seconds
        self.last_step = step
        logits = None
        if self.run.spec.supervised_logits_only:
            logits = counts.supervised_tokens
        values = {
            **metrics,
            "lr": lr,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "tokens_per_second": round(counts.tokens / took, 1),
            "supervised_tokens_per_second": round(counts.supervised_tokens / took, 1),
            "padding": round(1 - share(counts.tokens, counts.padded_tokens, 1.0), 4),
            "data_wait": round(share(counts.waited_seconds, counts.step_seconds, 0.0), 4),
            "mfu": self.flops.mfu(counts.tokens, counts.squared_lengths, took, logits),
            "mfu_all_logits": self.flops.mfu(counts.tokens, counts.squared_lengths, took),
            **self.axes(epoch),
            "step_seconds": round(took / steps, 4),
            "memory_gib": round(memory_gib, 3),
        }
        self.write(step, values, batch=f"{int(counts.checksum) % 2**32:08x}")
        self.screen.step(step, values)

    def axes(self, epoch: float) -> dict[str, float]:
        """What else than the step a curve may be drawn over: passes over the training rows, and their tokens so far."""
        return {"epoch": round(epoch, 6), "tokens": self.run.progress.tokens}

    def validation(self, step: int, metrics: dict[str, float], epoch: float) -> None:
        """Record the objective's metrics on the validation split."""
        values = {f"val_{column}": value for column, value in metrics.items()} | self.axes(epoch)
        self.write(step, values)
        self.screen.print(f"step {step}: validation loss [bold]{metrics['loss']:.4f}[/]")

    def samples(self, step: int, answers: list[dict[str, str]], in_file: bool) -> None:
        """Record answers of the live model: a table in every tracker, and a line each in samples.jsonl if `in_file`."""
        if in_file:
            with os.fdopen(rundir.append(self.run.run_dir, SAMPLES), "a", encoding="utf-8") as file:
                for answer in answers:
                    file.write(json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n")
        for tracker in self.trackers:
            tracker.table(step, "samples", answers)

    def write(self, step: int, values: Mapping[str, float | None], **for_file: str) -> None:
        """One object in metrics.jsonl, one point in every tracker; `for_file` is no number to draw."""
        present = without_none(values)
        line = {"step": step, "time": round(time.time(), 3), **present, **for_file}
        self.file.write(json.dumps(finite(line)) + "\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, tracked(present))

    def finish(self, summary: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """End the trackers and show the result."""
        self.screen.stop()
        self.file.close()
        scalars = {key: value for key, value in summary.items() if isinstance(value, int | float | str)}
        records = [tracker.finish(scalars) for tracker in self.trackers]
        self.screen.result(summary, samples)
        for record in filter(None, records):
            self.screen.print(shown(record))
        self.screen.phase("ending")


def describe(run: RunContext) -> list[str]:
    """What is trained, on what and for how long: the run's first lines, as rich markup."""
    adapter = run.groups.peft
    trainable = "all weights"
    if adapter is not None:
        trainable = f"{type(adapter).__name__} rank {adapter.rank}"
    where = "CPU"
    if run.on_gpu:
        where = "1 GPU" if run.world == 1 else f"{run.world} GPUs"
    report = run.splits.report["train"]
    unit = run.splits.report["unit"]
    epoch = run.epoch
    passes = epoch.trained(run.steps) / epoch.rows
    lines = [
        f"[bold]{shown(run.config.model.path)}[/]  {trainable}  {run.spec.precision}  {where}",
        f"{report['conversations']} {unit}s, {report['tokens']:,} tokens, {report['supervised_share']:.0%} supervised, "
        f"in {epoch.rows} rows of {run.settings.seq_length} ({report['packing_efficiency']:.1%} full)",
        f"{run.steps} steps: {passes:.2f} epochs of {epoch.describe()}",
        f"learning rate {run.schedule.describe()}",
    ]
    for note in run.schedule.notes:
        lines.append(f"[yellow]{note}[/]")
    if epoch.rows < epoch.batch:
        lines.append(
            f"[yellow]trainer.global_batch_size={epoch.batch}: there are {epoch.rows} rows, so every step has all of "
            "them[/]"
        )
    for note in run.splits.report["notes"]:
        lines.append(f"[yellow]{shown(note)}[/]")
    rows = run.splits.report["rows"]
    row_unit = run.splits.report["row_unit"]
    if rows["truncated"]:
        limit = run.settings.seq_length
        lines.append(f"[yellow]truncated to trainer.seq_length={limit}: {rows['truncated']:,} {row_unit}s[/]")
    for reason, count in rows["dropped"].items():
        lines.append(f"[yellow]left out, {shown(reason)}: {count:,} {row_unit}s[/]")
    for field, count in rows["unread"].items():
        lines.append(f"[yellow]not in the text: {shown(field)}, in {count:,} {row_unit}s[/]")
    if not run.validation_rows:
        lines.append("no validation loss: nothing is held out; data.validation_fraction=0.1 holds out a tenth")
    return lines


def share(part: float, whole: float, otherwise: float) -> float:
    """`part` of `whole`; `otherwise` where there is nothing."""
    return part / whole if whole else otherwise


def kept_lines(text: str, first_step: int, ended: bool) -> str:
    """The lines of an earlier process's file that a run resumed after `first_step` won't write again.

    What came after the checkpoint was lost with the process, and so is a line that it was writing when it ended.
    """
    kept = []
    for line in text.split("\n"):  # not where Unicode would end a line as well: answers may hold such characters
        try:
            if is_kept(json.loads(line), first_step, ended):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return "".join(kept)


def tracked(values: Mapping[str, float]) -> dict[str, float]:
    """Columns of metrics.jsonl by the names under which trackers draw them: train/loss, val/loss, perf/mfu."""
    named = {}
    for column, value in values.items():
        group, name = "train", column
        if column in PERFORMANCE:
            group = "perf"
        elif column.startswith("val_"):
            group, name = "val", column.removeprefix("val_")
        named[f"{group}/{name}"] = value
    return named


def points_at(step: int, text: str) -> list[dict[str, float]]:
    """The numbers at a step in lines of metrics.jsonl, as trackers draw them."""
    points = []
    for record in records_at(step, text):
        numbers = {}
        for key, value in record.items():
            if isinstance(value, int | float) and key != "time":
                numbers[key] = value
        points.append(tracked(numbers))
    return points


def answers_at(step: int, text: str) -> list[dict[str, str]]:
    """The answers at a step in lines of samples.jsonl."""
    return list(records_at(step, text))


def records_at(step: int, text: str) -> Iterator[dict[str, Any]]:
    """The objects of a step in lines that `kept_lines` has returned, without the step."""
    for line in text.split("\n"):
        record = json.loads(line) if line else {}
        if record.pop("step", None) == step:
            yield record


def is_kept(record: dict[str, Any], first_step: int, ended: bool) -> bool:
    """Whether a line's record is of a step before the resumed ones, and not found again where the run had `ended`."""
    step = record["step"]
    if step < first_step:
        return True
    again = ended and bool(record.keys() & {"val_loss", "answer"})
    return step == first_step > 0 and not again
