"""Layouts of processes on one machine, each against one process on the same machine: tok/s, memory, losses.

    python bench/scaling.py OVERRIDES... [--rows 8b 8b_ddp2 ...] [--gpus 2] [--steps 20] [--out DIR]

The rows are those of bench/scaling.yaml, in its order. As many run side by side as there are GPUs for, each on its own.
OVERRIDES are common to all: `model.random_init=true model.tokenizer=DIR objective=text data.path=FILE ...`. Random base
weights and adapters are the same in every layout, so losses are too, up to the order of sums. tok/s: the median step
after the first five. A line is printed as soon as it is known; the logs of runs are kept in DIR.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from posttrain.utils.gpus import visible_gpus

WARMUP = 5
ROWS = Path(__file__).with_suffix(".yaml")
HEAD = "| row | GPUs | tok/s per GPU | of one GPU's | MFU | peak GiB, planned | first step, s | losses differ by |"
COMMON = ["trainer.num_generations=0", "trainer.export=false", "checkpoint.save=false"]


@dataclass
class Run:
    """A row while it runs.

    Attributes:
        name: of the row.
        row: as in scaling.yaml: `overrides`, and where there are several, `gpus` and `of`, the row of one GPU.
        gpus: their numbers.
    """

    name: str
    row: dict[str, Any]
    gpus: list[str]
    out: Path
    process: subprocess.Popen[bytes] = field(init=False)
    began: float = field(default_factory=time.monotonic)

    @property
    def directory(self) -> Path:
        """The run's."""
        return self.out / self.name

    def start(self, overrides: list[str]) -> None:
        """Start the command."""
        visible = ",".join(self.gpus)
        command = [sys.executable, "-m", "posttrain", *overrides, *COMMON, *self.row["overrides"]]
        command += [f"parallelism.nproc_per_node={len(self.gpus)}", f"hydra.run.dir={self.directory}"]
        with self.log.open("wb") as file:
            self.process = self.spawn(command, os.environ | {"CUDA_VISIBLE_DEVICES": visible}, file)

    @staticmethod
    def spawn(command: list[str], env: dict[str, str], file: IO[bytes]) -> subprocess.Popen[bytes]:
        """The command with all its output in a file."""
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """End a command that takes too long, whose ranks end with it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> Path:
        """The command's output."""
        return self.out / f"{self.name}.log"

    def result(self) -> dict[str, Any] | None:
        """Numbers of a run that has ended well."""
        try:
            summary = json.loads((self.directory / "summary.json").read_text())
            lines = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        except OSError:
            return None
        steps = [line for line in lines if "loss" in line]
        timed = steps[WARMUP:] or steps
        return {
            "losses": [line["loss"] for line in steps],
            "speed": statistics.median(line["tokens_per_second"] for line in timed) / len(self.gpus),
            "mfu": statistics.median(line.get("mfu_all_logits") or 0.0 for line in timed),
            "summary": summary,
        }


def line(run: Run, found: dict[str, Any] | None, alone: dict[str, Any] | None) -> str:
    """A row of the table."""
    if found is None:
        return f"| {run.name} | {len(run.gpus)} | failed with exit code {run.process.returncode}, see {run.log} |"
    summary = found["summary"]
    memory = f"{summary['peak_memory_gib']:.1f}, {summary.get('memory_planned_gib', 0):.1f}"
    share, differ = "", ""
    if alone:
        share = f"{found['speed'] / alone['speed']:.0%}"
        pairs = zip(found["losses"], alone["losses"], strict=False)
        differ = f"{max(abs(a - b) / abs(b) for a, b in pairs):.0e}"
    cells = [run.name, len(run.gpus), f"{found['speed']:,.0f}", share, f"{found['mfu']:.0%}", memory]
    cells += [summary["time_to_first_step_s"], differ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Run the rows."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("overrides", nargs="+")
    options.add_argument("--rows", nargs="+")
    options.add_argument("--gpus", type=int, default=visible_gpus(), help="how many of those that there are")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--out", type=Path, default=Path("outputs/scaling"))
    options.add_argument("--limit", type=float, default=240, help="seconds that a run may take")
    given = options.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    table = yaml.safe_load(ROWS.read_text())
    waiting = list(given.rows or table)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    free = visible.split(",") if visible else [str(number) for number in range(given.gpus)]
    running: list[Run] = []
    done: dict[str, Any] = {}
    print(HEAD)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    while waiting or running:
        for name in list(waiting):
            row = table[name]
            count = row.get("gpus", 1)
            if count <= len(free):
                waiting.remove(name)
                run = Run(name, row, [free.pop() for _ in range(count)], given.out)
                run.start([*given.overrides, f"trainer.max_steps={given.steps}"])
                running.append(run)
        time.sleep(0.5)
        for run in list(running):
            if run.process.poll() is None and time.monotonic() - run.began > given.limit:
                run.stop()
            if run.process.poll() is not None:
                running.remove(run)
                free += run.gpus
                done[run.name] = run.result()
                print(line(run, done[run.name], done.get(run.row.get("of"))), flush=True)
    (given.out / "results.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
