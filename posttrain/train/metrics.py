"""The numbers of a run: metrics.jsonl, the trackers, and the line on the terminal. First rank only."""

import json
import os
import time
from typing import Any

from omegaconf import OmegaConf

from posttrain.train.console import Screen, shown
from posttrain.utils import rundir
from posttrain.utils.atomic_files import finite

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Metrics:
    """Takes each logged step and hands it to every place that wants it.

    Args:
        trainer: the run's trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.screen = Screen.inherited()

    def start(self, first_step: int, flops: Any, planned: float | None) -> None:
        """Announce the run, with the peak memory that is planned for it (GiB), and start the trackers."""
        t, self.flops = self.trainer, flops
        self.last_seconds = t.progress.seconds
        rundir.remove(t.run_dir, "summary.json")  # left from a pruned trial that is being resumed
        kept = {name: self.keep(name, first_step) for name in (METRICS, SAMPLES)}
        self.file = os.fdopen(rundir.append(t.run_dir, METRICS), "a", encoding="utf-8")
        run = t.config.run.name or t.run_dir.name
        config = OmegaConf.to_container(t.config, resolve=True)
        for tracker in t.trackers:
            tracker.start(t.run_dir, run, config)
            if tracker.notice:
                self.screen.print(shown(tracker.notice))
        trainable = "all weights" if t.peft is None else f"{type(t.adapter).__name__} rank {t.adapter.rank}"
        precision = t.precision.resolve(t.platform.device)
        where = "CPU" if t.platform.device == "cpu" else f"{t.world} GPU" + ("s" if t.world > 1 else "")
        train = t.splits.report["train"]
        self.screen.print(f"[bold]{shown(t.config.model.path)}[/]  {trainable}  {precision}  {where}")
        share, full = f"{train['supervised_share']:.0%}", f"{train['packing_efficiency']:.1%}"
        self.screen.print(
            f"{train['conversations']} conversations, {train['tokens']:,} tokens, {share} trained, "
            f"in {len(t.splits.train)} rows of {t.settings.seq_length} ({full} full)"
        )
        epochs = t.steps * t.settings.global_batch_size / len(t.splits.train)
        self.screen.print(f"{t.steps} steps of {t.settings.global_batch_size} rows: {epochs:.2f} epochs")
        if planned is not None:
            self.screen.print(f"planned peak memory {planned:.1f} GiB per GPU")
        for line in t.skipped:
            self.screen.print(f"skipped {shown(line)}")
        back = t.progress.rollbacks[-1:]
        if back and back[0]["to"] == first_step and f'"rolled_back_from": {back[0]["step"]},' not in kept[METRICS]:
            self.write(first_step, {"rolled_back_from": back[0]["step"]}, why=back[0]["why"])
        if first_step:
            self.screen.print(f"resuming after step {first_step}")
        self.screen.start(first_step, t.steps)

    def keep(self, name: str, first_step: int) -> str:
        """Leave in a file of lines what an earlier process has written up to `first_step`; returns that."""
        run_dir = self.trainer.run_dir
        if not rundir.is_file(run_dir, name):
            return ""
        text = rundir.read_text(run_dir, name, rundir.LONG, errors="replace")  # a line may be cut within a character
        text = kept_lines(text, first_step, self.trainer.steps)
        rundir.write_text(run_dir, name, text)
        return text

    def step(self, step: int, *, loss: float, lr: float, grad_norm: Any, counts: list[float], seconds: float,
             epoch: float) -> None:  # fmt: skip
        """Record a logged step.

        Args:
            counts: as in batches.Counted.names, and the seconds of steps, over the processes since the last logged one.
            seconds: in steps since the start.
        """
        took, self.last_seconds = seconds - self.last_seconds, seconds
        trained, tokens, squared, padded, checksum, waited, steps_took = counts
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": float(grad_norm) if grad_norm is not None else None,
            "tokens_per_second": round(tokens / took, 1),
            "supervised_tokens_per_second": round(trained / took, 1),
            "padding": round(1 - tokens / padded, 4) if padded else 0.0,
            "data_wait": round(waited / steps_took, 4) if steps_took else 0.0,
            "mfu": self.flops.mfu(tokens, squared, took),
            "epoch": round(epoch, 4),
            "step_seconds": round(took / self.trainer.settings.log_interval, 4),
        }
        self.write(step, values, batch=f"{int(checksum) % 2**32:08x}")
        self.screen.step(step, values)

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        self.write(step, {"val_loss": loss})
        self.screen.print(f"step {step}: validation loss [bold]{loss:.4f}[/]")

    def samples(self, step: int, answers: list[dict[str, str]]) -> None:
        """Record answers of the live model: a line each in samples.jsonl, a table in every tracker."""
        with os.fdopen(rundir.append(self.trainer.run_dir, SAMPLES), "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n" for answer in answers)
        for tracker in self.trainer.trackers:
            tracker.table(step, "samples", answers)

    def write(self, step: int, values: dict[str, Any], **for_file: Any) -> None:
        """One object in metrics.jsonl, one point in every tracker; `for_file` is no number to draw."""
        present = {key: value for key, value in values.items() if value is not None}
        line = {"step": step, "time": round(time.time(), 3), **present, **for_file}
        self.file.write(json.dumps(finite(line)) + "\n")
        self.file.flush()
        for tracker in self.trainer.trackers:
            tracker.log(step, present)

    def finish(self, summary: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """End the trackers and show the result."""
        self.screen.stop()
        self.file.close()
        scalars = {key: value for key, value in summary.items() if isinstance(value, int | float | str)}
        for tracker in self.trainer.trackers:
            tracker.finish(scalars)
        self.screen.result(summary, samples)


def kept_lines(text: str, first_step: int, steps: int) -> str:
    """The lines of an earlier process's file that a run resuming after `first_step` won't write again.

    What came after the checkpoint was lost with the process, and so is a line that it was writing when it ended.
    """
    kept = []
    for line in text.split("\n"):  # not where Unicode would end a line as well: answers may hold such characters
        try:
            record = json.loads(line)
            before = record["step"] < first_step or (record["step"] == first_step > 0 and not (
                first_step == steps and record.keys() & {"val_loss", "answer"}  # are found again at the end
            ))  # fmt: skip
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if before:
            kept.append(line + "\n")
    return "".join(kept)
