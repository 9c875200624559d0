"""Peers on the work of bench/scaling.py's rows: tok/s, MFU and memory of other projects on this machine.

    python bench/peers.py OVERRIDES... [--rows 8b_liger 8b_unsloth ...] [--gpus 2] [--steps 20] [--limit 300]
        [--unsloth DIR] [--out DIR]

The rows are those of bench/peers.yaml. Each names a peer and a row of bench/scaling.yaml, whose model, batch, adapter
and layout it takes; OVERRIDES are those that bench/scaling.py is given, so that both do the same work (the keys of data
are not used here). Every peer trains random weights, made on the device, on full rows of random tokens, each
supervised: in bf16, with fused AdamW, gradients clipped to norm 1, and activations computed again only with
`trainer.recompute=full`.

As many rows run side by side as there are GPUs for, each in processes of its own. A line is printed as soon as it is
known, also of one that failed; logs are in the directory of --out. tok/s: the median step after the first five. MFU: by
`posttrain/plan/flops.py`, as a run's `mfu_all_logits`. Memory: of the process with the most, as torch allocated and
as it reserved it. Unsloth requires `model.tokenizer=DIR`; where its packages are apart, --unsloth is their directory.
"""

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jobs import Job, choose_gpus, make_empty, options_of_rows, run_jobs
from peer_work import Work

from posttrain.config.composition import compose
from posttrain.models.hf import plain
from posttrain.plan.flops import ModelFlops
from posttrain.spec.shape import Shape
from posttrain.utils import stop
from posttrain.utils.gpus import peak_tflops

WARMUP = 5
FULL_ROWS = ["trainer.seq_length=4096", "trainer.micro_batch_size=1"]  # unless given: rows of the demo's data are short
HERE = Path(__file__).parent
HEAD = "| row | peer | GPUs | tok/s per GPU | MFU | peak GiB, reserved | step, ms |"
NAMES = {
    "transformers": "Transformers",
    "unsloth": "Unsloth",
    "bridge": "Megatron-Bridge",
}
RAISED = re.compile(r"^(\w+(?:Error|Exception): .*)", re.MULTILINE)  # the end of a traceback
LONGEST_REASON = 160  # characters of what a peer raised


def work_of(row: dict[str, Any], scaling: dict[str, Any], overrides: list[str], steps: int) -> Work:
    """What a row's peer trains.

    Args:
        row: as in peers.yaml: `peer`, `work`, a row of scaling.yaml, and fields of Work that are the peer's own.
        scaling: that row.
        overrides: common to all rows.
        steps: to time, with those of warm-up.
    """
    cfg = compose([*FULL_ROWS, *overrides, *scaling["overrides"]])
    lora = cfg.peft._target_ is not None
    own = {key: value for key, value in row.items() if key not in ("peer", "work")}
    return Work(
        architecture=plain(cfg.model.architecture),
        gpus=scaling.get("gpus", 1),
        seq_length=cfg.trainer.seq_length,
        micro_batch=cfg.trainer.micro_batch_size,
        global_batch=cfg.trainer.global_batch_size,
        steps=steps,
        rank=cfg.peft.rank if lora else None,
        alpha=cfg.peft.alpha or 2 * cfg.peft.rank,
        checkpointing=cfg.trainer.recompute == "full",
        tensor_parallel=cfg.parallelism.tensor_model_parallel_size,
        pipeline_parallel=cfg.parallelism.pipeline_model_parallel_size,
        tokenizer=cfg.model.tokenizer,
        **own,
    )


def job_of(name: str, peer: str, work: Work, given: argparse.Namespace) -> Job:
    """The command that starts a row's processes."""
    directory = given.out / name
    directory.mkdir()
    file = directory / "work.json"
    file.write_text(json.dumps(asdict(work)))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={work.gpus}"]
    command = [sys.executable, *launch, str(HERE / f"peer_{peer}.py"), str(file)]
    environment = {"UNSLOTH_COMPILE_LOCATION": str(directory / "compiled")}
    if not work.block_compile:
        environment["UNSLOTH_BLOCK_COMPILE"] = "0"
    if peer == "unsloth" and given.unsloth:
        environment["PYTHONPATH"] = str(given.unsloth)  # and nothing of what the others import
    return Job(name, command, work.gpus, given.out / f"{name}.log", environment)


def result(directory: Path, job: Job, work: Work) -> dict[str, Any]:
    """Numbers of a row that has ended: `speed` in tok/s per GPU, `mfu`, `step_s`, memory; or `error`."""
    ranks = [json.loads(file.read_text()) for file in sorted(directory.glob("rank*.json"))]
    errors = [rank["error"] for rank in ranks if "error" in rank]
    if errors or len(ranks) < work.gpus:
        errors += RAISED.findall(job.log.read_text(errors="replace"))  # also of one that did not get as far as its work
        if job.stopped:
            errors.append(f"stopped after {time.monotonic() - job.began:.0f} s")
        return {"error": [*errors, "no result"][0]}
    seconds = ranks[0]["seconds"]
    step = statistics.median(seconds[WARMUP:] or seconds)
    found = {"step_s": step, "speed": work.tokens / step / work.gpus, "mfu": None, "ranks": ranks}
    if "device" in ranks[0]:
        tflops = peak_tflops(ranks[0]["device"])
        peak = tflops * 1e12 * work.gpus if tflops else None
        shape = Shape.from_config(work.architecture)
        flops = ModelFlops.from_shape(shape, frozen=work.rank is not None, peak=peak)
        found["mfu"] = flops.mfu(work.tokens, work.tokens * work.seq_length, step)
        found["peak_gib"] = max(rank["peak_gib"] for rank in ranks)
        found["reserved_gib"] = max(rank["reserved_gib"] for rank in ranks)
    return found


def title(peer: str, work: Work) -> str:
    """The peer and how it was told to work."""
    parts = [NAMES[peer]]
    if peer == "transformers" and work.rank:
        parts.append("PEFT")
    if work.liger:
        parts.append("Liger")
    if peer == "transformers" and work.gpus > 1:
        parts.append("FSDP2")
    return " + ".join(parts)


def line(job: Job, peer: str, work: Work, found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [job.name, title(peer, work), str(work.gpus)]
    if "error" in found:
        reason = " ".join(found["error"].split()).replace("|", "/")[:LONGEST_REASON]
        cells.append(f"failed with exit code {job.process.returncode}: {reason}; see {job.log}")
        return "| " + " | ".join(cells) + " |"
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.0%}"
    memory = ""
    if "peak_gib" in found:
        memory = f"{found['peak_gib']:.1f}, {found['reserved_gib']:.1f}"
    cells += [f"{found['speed']:,.0f}", mfu, memory, f"{found['step_s'] * 1000:,.0f}"]
    return "| " + " | ".join(cells) + " |"


@stop.command
def main() -> None:
    """Run the rows."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    scaling = yaml.safe_load((HERE / "scaling.yaml").read_text())
    options = options_of_rows(__doc__.splitlines()[0], table, Path("outputs/peers"), limit=300)
    options.add_argument("--unsloth", type=Path, help="directory of Unsloth's packages where they are apart")
    given = options.parse_args()
    make_empty(given.out)
    works = {}
    jobs = []
    for name in given.rows:
        row = table[name]
        works[name] = work_of(row, scaling[row["work"]], given.overrides, given.steps)
        jobs.append(job_of(name, row["peer"], works[name], given))
    done = {}
    gpus = choose_gpus(options, jobs, given.gpus)
    print(HEAD)
    print("|---|---|---|---|---|---|---|", flush=True)
    for job in run_jobs(jobs, gpus, given.limit):
        work = works[job.name]
        done[job.name] = result(given.out / job.name, job, work)
        print(line(job, table[job.name]["peer"], work, done[job.name]), flush=True)
    (given.out / "results.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
