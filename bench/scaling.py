"""Layouts of processes on one machine against one process: the same losses, and how much faster.

    python bench/scaling.py WORDS... [--layouts ddp zero1 fsdp tp2 pp2 cp2] [--processes 2]

WORDS are those of a run, e.g. `model=llama32_1b model.random_init=true model.tokenizer=DIR data=prompt_completion ...`;
with a mixture of experts `--layouts ep2`. The global batch is the same for all, so the losses are, up to the order of
sums; efficiency is tok/s per process over that of one process. tok/s: the median step after the first five.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARMUP = 5


def run(words: list[str]) -> tuple[list[float], float]:
    """Losses, and tok/s, of a run with these words."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        fixed = [
            "trainer.num_generations=0",
            "trainer.export=false",
            "checkpoint.save=false",
            f"hydra.run.dir={directory}",
        ]
        subprocess.run([sys.executable, "-m", "posttrain", *words, *fixed], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    speeds = [line["tokens_per_second"] for line in trained]
    return [line["loss"] for line in trained], statistics.median(speeds[WARMUP:] or speeds)


def main() -> None:
    """Measure each layout, print a row as soon as it is known."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("words", nargs="+")
    options.add_argument("--layouts", nargs="+", default=["ddp", "zero1", "tp2", "pp2"])
    options.add_argument("--processes", type=int, default=2)
    given = options.parse_args()
    losses, alone = run([*given.words, "parallelism=single"])
    print("| layout | processes | largest relative difference of a loss | tok/s per process | efficiency |")
    print("|---|---|---|---|---|")
    print(f"| single | 1 | | {alone:,.0f} | |", flush=True)
    for layout in given.layouts:
        size = f"parallelism.nproc_per_node={given.processes}"
        try:
            found, speed = run([*given.words, f"parallelism={layout}", size])
        except subprocess.CalledProcessError as error:
            print(f"| {layout} | {given.processes} | failed with exit code {error.returncode} | | |", flush=True)
            continue
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True))
        each = speed / given.processes
        print(f"| {layout} | {given.processes} | {worst:.0e} | {each:,.0f} | {each / alone:.0%} |", flush=True)


if __name__ == "__main__":
    main()
