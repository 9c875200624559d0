"""Training speed on this GPU: `python -m posttrain.bench DATA.jsonl TOKENIZER_DIR`.

DATA.jsonl has `question` and `answer` (GSM8K's train.jsonl, say). This project trains it packed,
with its defaults; the others train random full-length sequences, without padding or boundaries, the
best case for them. tok/s counts prompt and answer tokens without padding, the median step after the
first five. MFU: posttrain/plan/flops.py, over the bf16 peak.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.bench.workloads import MODELS, WORKLOADS, Workload
from posttrain.utils import stop
from posttrain.utils.gpus import peak_tflops

REQUIRES = {
    "hf": "peft",
    "liger": "liger_kernel",
    "unsloth": "unsloth",
    "bridge": "transformer_engine",
}
MOST_WAITING = 8  # peers that import ahead of their turn
WORDS = (
    "time",
    "house",
    "water",
    "seven",
    "green",
    "mountain",
    "answer",
    "between",
    "carry",
    "ninety",
)


def run_posttrain(workload: Workload, data: Path, tokenizer: Path, steps: int, scratch: Path) -> dict[str, Any]:
    """Train with this project and return its own metrics."""
    run_dir = scratch / f"{workload.name}-{data.stem}"
    overrides = [
        f"model={MODELS[workload.shape]}",
        "model.random_init=true",
        f"model.tokenizer={tokenizer}",
        "data=prompt_completion",
        f"data.path={data}",
        "data.format.prompt=question",
        "data.format.completion=answer",
        "data.validation_fraction=null",
        f"trainer.max_steps={steps}",
        f"trainer.global_batch_size={workload.global_batch_size}",
        f"trainer.micro_batch_size={workload.micro}",
        f"trainer.seq_length={workload.length}",
        "trainer.num_generations=0",
        "trainer.export=false",
        "checkpoint.save=false",
        f"hydra.run.dir={run_dir}",
    ]
    if workload.full:
        overrides.append("peft=none")
    if workload.fp8:
        overrides.append("precision=fp8")
    command = [sys.executable, "-m", "posttrain", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps_done = [point for point in points if "loss" in point][5:]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    result = {
        "tok_s": statistics.median(point["tokens_per_second"] for point in steps_done),
        "peak_gib": summary["peak_memory_gib"],
        "first_step_s": summary["time_to_first_step_s"],
    }
    # As the other sides' is counted: prompts get no logits here, but the work is the same.
    mfu = [point["mfu_all_logits"] for point in steps_done if "mfu_all_logits" in point]
    if mfu:
        result["mfu"] = statistics.median(mfu)
    return result


def write_full_length(path: Path, tokenizer: Path, length: int, count: int) -> None:
    """Write conversations of random words, each nearly `length` tokens, most of them trained."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            words = [rng.choice(WORDS) for _ in range(length)]
            while len(encode(" ".join(words)).ids) > length - 32:
                del words[-16:]
            out.write(json.dumps({"question": "go", "answer": " ".join(words)}) + "\n")


@dataclass
class Peer:
    """One of the others, in a process of its own.

    Attributes:
        workload: to measure.
        process: imports, then waits for its turn.
        log: its stderr.
    """

    workload: Workload
    process: subprocess.Popen[str]
    log: IO[str]

    @classmethod
    def start(cls, side: str, workload: Workload, args: argparse.Namespace) -> "Peer":
        """Start the process of a side."""
        own = {"POSTTRAIN_BENCH_TOKENIZER": str(args.tokenizer), "UNSLOTH_DISABLE_STATISTICS": "1"}
        environment = os.environ | own
        if side == "unsloth" and args.unsloth:  # and nothing of what the others import
            paths = (args.unsloth, Path(__file__).resolve().parents[2])
            environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        command = [sys.executable, "-m", "posttrain.bench.peers", side, workload.name]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with this process)
        process = subprocess.Popen(
            [*command, str(args.steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        return cls(workload, process, log)

    def finish(self, peak: float | None, timeout_s: float) -> dict[str, Any]:
        """Give the process its turn and return its result.

        Args:
            peak: operations per second that the GPU can do; None: unknown.
            timeout_s: after so many seconds it is killed.
        """
        try:
            out, _ = self.process.communicate("go\n", timeout=timeout_s)
            results = [line for line in out.splitlines() if line.startswith("{")]
            result = json.loads(results[-1])
        except (subprocess.TimeoutExpired, OSError, ValueError, IndexError):
            self.process.kill()
            self.log.seek(0)
            return {"error": self.log.read().strip()[-300:] or "no result"}
        if peak:
            seconds = self.workload.tokens / result["tok_s"]
            result["mfu"] = self.workload.operations() / seconds / peak
        return result


def is_available(side: str, args: argparse.Namespace) -> bool:
    """Whether a side can be measured here."""
    if side.startswith("posttrain"):
        return True
    if side == "unsloth" and args.unsloth is not None:
        return True
    return importlib.util.find_spec(REQUIRES[side]) is not None


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the table; a row's ratio is posttrain's speed over the side's."""
    own_speed = {}
    for result in results:
        if result["side"] == "posttrain" and "tok_s" in result:
            own_speed[result["row"]] = result["tok_s"]
    print("\n| row | side | tok/s | posttrain is | MFU | peak GiB | first step s |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        row, side = result["row"], result["side"]
        if "error" in result:
            print(f"| {row} | {side} | failed | | | | |")
            continue
        ratio = mfu = first_step = ""
        if row in own_speed and side != "posttrain":
            ratio = f"{own_speed[row] / result['tok_s']:.2f}x"
        if result.get("mfu"):
            mfu = f"{result['mfu']:.0%}"
        if "first_step_s" in result:
            first_step = f"{result['first_step_s']:.1f}"
        speed = f"{result['tok_s']:,.0f}"
        memory = f"{result['peak_gib']:.1f}"
        print(f"| {row} | {side} | {speed} | {ratio} | {mfu} | {memory} | {first_step} |")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = [workload.name for workload in WORKLOADS]
    add("data", type=Path, help="JSON lines with question and answer")
    add("tokenizer", type=Path, help="directory with tokenizer.json")
    add("--rows", nargs="+", choices=names, help="default: all")
    add("--sides", nargs="+", help="default: all that are installed")
    add("--steps", type=int, default=12, help="of each measurement, the first five not counted")
    add("--unsloth", type=Path, help="directory of Unsloth's packages where they need their own")
    add("--limit", type=float, default=180.0, help="seconds for one peer")
    add("--out", type=Path, help="JSON file for the results; existing ones are kept and shown")
    return parser.parse_args()


def choose_measurements(args: argparse.Namespace) -> list[tuple[Workload, str]]:
    """The workloads and sides that are asked for and available."""
    chosen = []
    for workload in WORKLOADS:
        if args.rows and workload.name not in args.rows:
            continue
        for side in workload.sides:
            if args.sides and side not in args.sides:
                continue
            if is_available(side, args):
                chosen.append((workload, side))
    return chosen


@stop.command
def main() -> None:
    """Measure and print the table."""
    args = parse_args()
    import torch

    device = torch.cuda.get_device_name()
    tflops = peak_tflops(device)
    peak = None if tflops is None else tflops * 1e12
    print(f"{device}, torch {torch.__version__}", flush=True)
    measurements = choose_measurements(args)
    pending = [(load, side) for load, side in measurements if not side.startswith("posttrain")]
    waiting: dict[tuple[str, str], Peer] = {}
    results = []
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    data, tokenizer = args.data.resolve(), args.tokenizer.resolve()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for workload, side in measurements:
            while pending and len(waiting) < MOST_WAITING:
                next_workload, next_side = pending.pop(0)
                key = (next_workload.name, next_side)
                waiting[key] = Peer.start(next_side, next_workload, args)
            began = time.perf_counter()
            if side == "posttrain":
                result = run_posttrain(workload, data, tokenizer, args.steps, scratch)
            elif side == "posttrain-full-length":
                full_length = scratch / "full_length.jsonl"
                count = args.steps * workload.global_batch_size
                write_full_length(full_length, tokenizer, workload.length, count)
                result = run_posttrain(workload, full_length, tokenizer, args.steps, scratch)
            else:
                result = waiting.pop((workload.name, side)).finish(peak, args.limit)
            seconds = time.perf_counter() - began
            results.append({"row": workload.name, "side": side, **result})
            outcome = result.get("error")
            if not outcome:
                outcome = f"{result['tok_s']:9,.0f} tok/s {result['peak_gib']:6.1f} GiB"
            print(f"{workload.name:12} {side:22} {outcome}  ({seconds:.0f} s)", flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
