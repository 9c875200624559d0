"""Layouts of processes on one machine, each against one process on the same machine: tok/s, memory, losses.

    python bench/scaling.py OVERRIDES... [--rows 8b 8b_ddp2 ...] [--gpus 2] [--steps 20] [--out DIR]

The rows are those of bench/scaling.yaml, in its order. As many run side by side as there are GPUs for, each on its own.
OVERRIDES are common to all: `model.random_init=true model.tokenizer=DIR objective=text data.path=FILE ...`. Random base
weights and adapters are the same in every layout, so losses are too, up to the order of sums. tok/s: the median step
after the first five. A line is printed as soon as it is known; the logs of runs are kept in DIR.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from jobs import Job, choose_gpus, make_empty, options_of_rows, run_jobs

from posttrain.utils import stop

WARMUP = 5
ROWS = Path(__file__).with_suffix(".yaml")
HEAD = "| row | GPUs | tok/s per GPU | of one GPU's | MFU | peak GiB, planned | first step, s | losses differ by |"
COMMON = ["trainer.num_generations=0", "trainer.export=false", "checkpoint.save=false"]


def job_of(name: str, row: dict[str, Any], overrides: list[str], out: Path) -> Job:
    """The command of a row.

    Args:
        name: of the row.
        row: as in scaling.yaml: `overrides`, and where there are several, `gpus` and `of`, the row of one GPU.
        overrides: common to all rows.
        out: directory of logs and run directories.
    """
    count = row.get("gpus", 1)
    command = [sys.executable, "-m", "posttrain", *overrides, *COMMON, *row["overrides"]]
    command += [f"parallelism.nproc_per_node={count}", f"hydra.run.dir={out / name}"]
    return Job(name, command, count, out / f"{name}.log")


def result(directory: Path, gpus: int) -> dict[str, Any] | None:
    """Numbers of a run that has ended well."""
    try:
        summary = json.loads((directory / "summary.json").read_text())
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    except OSError:
        return None
    steps = [line for line in lines if "loss" in line]
    timed = steps[WARMUP:] or steps
    return {
        "losses": [line["loss"] for line in steps],
        "speed": statistics.median(line["tokens_per_second"] for line in timed) / gpus,
        "mfu": statistics.median(line.get("mfu_all_logits") or 0.0 for line in timed),
        "summary": summary,
    }


def line(job: Job, found: dict[str, Any] | None, alone: dict[str, Any] | None) -> str:
    """A row of the table."""
    if found is None:
        return f"| {job.name} | {job.count} | failed with exit code {job.process.returncode}, see {job.log} |"
    summary = found["summary"]
    memory = f"{summary['peak_memory_gib']:.1f}, {summary.get('memory_planned_gib', 0):.1f}"
    share, differ = "", ""
    if alone:
        share = f"{found['speed'] / alone['speed']:.0%}"
        pairs = zip(found["losses"], alone["losses"], strict=False)
        differ = f"{max(abs(a - b) / abs(b) for a, b in pairs):.0e}"
    cells = [job.name, job.count, f"{found['speed']:,.0f}", share, f"{found['mfu']:.0%}", memory]
    cells += [summary["time_to_first_step_s"], differ]
    return "| " + " | ".join(map(str, cells)) + " |"


@stop.command
def main() -> None:
    """Run the rows."""
    table = yaml.safe_load(ROWS.read_text())
    options = options_of_rows(__doc__.splitlines()[0], table, Path("outputs/scaling"), limit=240)
    given = options.parse_args()
    make_empty(given.out)
    overrides = [*given.overrides, f"trainer.max_steps={given.steps}"]
    jobs = [job_of(name, table[name], overrides, given.out) for name in given.rows]
    done: dict[str, Any] = {}
    gpus = choose_gpus(options, jobs, given.gpus)
    print(HEAD)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for job in run_jobs(jobs, gpus, given.limit):
        done[job.name] = result(given.out / job.name, job.count)
        print(line(job, done[job.name], done.get(table[job.name].get("of"))), flush=True)
    (given.out / "results.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
