"""`python -m posttrain.bench DATA.jsonl TOKENIZER_DIR`: training speed on this GPU, this project and others.

DATA.jsonl has `question` and `answer` (GSM8K's train.jsonl, say). This project trains it packed, by its defaults; the
others train random full-length sequences, without padding or boundaries, the best case for them. tok/s counts prompt
and answer tokens without padding, the median step after the first five. MFU: posttrain/flops.py, over the bf16 peak.
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
from pathlib import Path
from typing import Any

from posttrain.bench.rows import MODELS, ROWS, Row
from posttrain.flops import peak_flops

NEEDS = {"hf": "peft", "liger": "liger_kernel", "unsloth": "unsloth", "bridge": "transformer_engine"}
MOST_WAITING = 8  # peers that import ahead of their turn


def ours(row: Row, data: Path, tokenizer: Path, steps: int, work: Path) -> dict[str, Any]:
    """Train with this project; its own metrics."""
    run = work / f"{row.name}-{data.stem}"
    words = [
        f"model={MODELS[row.shape]}", "model.random_init=true", f"model.tokenizer={tokenizer}",
        "data=prompt_completion", f"data.path={data}", "data.format.prompt=question",
        "data.format.completion=answer", "data.validation_fraction=null", f"trainer.max_steps={steps}",
        f"trainer.global_batch_size={row.micro * row.accumulation}", f"trainer.micro_batch_size={row.micro}",
        f"trainer.seq_length={row.length}", "trainer.samples=0", "trainer.export=false", "checkpoint.save=false",
        f"hydra.run.dir={run}", *(["peft=none"] if row.full else []), *(["precision=fp8"] if row.fp8 else []),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "posttrain", *words], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line][5:]
    summary = json.loads((run / "summary.json").read_text())
    found = {"tok_s": statistics.median(line["tokens_per_second"] for line in lines),
             "peak_gib": summary["peak_memory_gib"], "first_step_s": summary["time_to_first_step_s"]}  # fmt: skip
    mfu = [line["mfu"] for line in lines if "mfu" in line]
    return found | ({"mfu": statistics.median(mfu)} if mfu else {})


def write_full_length(path: Path, tokenizer: Path, length: int, rows: int) -> None:
    """Conversations of random words, each nearly `length` tokens and all but its first word trained."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    draw = random.Random(0)
    words = ["time", "house", "water", "seven", "green", "mountain", "answer", "between", "carry", "ninety"]
    with path.open("w") as out:
        for _ in range(rows):
            said = [draw.choice(words) for _ in range(length)]
            while len(encode(" ".join(said)).ids) > length - 32:
                del said[-16:]
            out.write(json.dumps({"question": "go", "answer": " ".join(said)}) + "\n")


def start(side: str, row: Row, steps: int, given: argparse.Namespace, log: Any) -> subprocess.Popen:
    """A peer that imports and waits for its turn."""
    env = os.environ | {"POSTTRAIN_BENCH_TOKENIZER": str(given.tokenizer)}
    if side == "unsloth" and given.unsloth:  # and nothing of what the others import
        env["PYTHONPATH"] = os.pathsep.join([str(given.unsloth), str(Path(__file__).resolve().parents[2])])
    command = [sys.executable, "-m", "posttrain.bench.peers", side, row.name, str(steps)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env)


def finish(process: subprocess.Popen, row: Row, peak: float | None, log: Any, limit: float) -> dict[str, Any]:
    """Give a waiting peer its turn; its result."""
    try:
        out, _ = process.communicate("go\n", timeout=limit)
        result = json.loads([line for line in out.splitlines() if line.startswith("{")][-1])
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError):
        process.kill()
        log.seek(0)
        return {"error": log.read().strip()[-300:] or "no result"}
    if peak:
        result["mfu"] = row.operations() * result["tok_s"] / row.tokens / peak
    return result


def available(side: str, given: argparse.Namespace) -> bool:
    """Whether a side can be measured here."""
    if side.startswith("posttrain"):
        return True
    return importlib.util.find_spec(NEEDS[side]) is not None or (side == "unsloth" and given.unsloth is not None)


def show(results: list[dict[str, Any]]) -> None:
    """Print the table; a row's ratio is posttrain's speed over the side's."""
    ours = {r["row"]: r["tok_s"] for r in results if r["side"] == "posttrain" and "tok_s" in r}
    print("\n| row | side | tok/s | posttrain is | MFU | peak GiB | first step s |\n|---|---|---|---|---|---|---|")
    for r in results:
        if "error" in r:
            print(f"| {r['row']} | {r['side']} | failed | | | | |")
            continue
        ratio = f"{ours[r['row']] / r['tok_s']:.2f}x" if r["row"] in ours and r["side"] != "posttrain" else ""
        mfu = f"{r['mfu']:.0%}" if r.get("mfu") else ""
        first = f"{r['first_step_s']:.1f}" if "first_step_s" in r else ""
        print(f"| {r['row']} | {r['side']} | {r['tok_s']:,.0f} | {ratio} | {mfu} | {r['peak_gib']:.1f} | {first} |")


def main() -> None:
    """Measure, print the table."""
    options = argparse.ArgumentParser(prog="python -m posttrain.bench", description=__doc__.splitlines()[0])
    options.add_argument("data", type=Path, help="JSON lines with question and answer")
    options.add_argument("tokenizer", type=Path, help="directory with tokenizer.json")
    options.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="default: all")
    options.add_argument("--sides", nargs="+", help="default: all that are installed")
    options.add_argument("--steps", type=int, default=12, help="of each measurement, the first five not counted")
    options.add_argument("--unsloth", type=Path, help="directory of Unsloth's packages where they need their own")
    options.add_argument("--limit", type=float, default=180.0, help="seconds for one peer")
    options.add_argument("--out", type=Path, help="JSON file for the results; those in it are kept and shown as well")
    given = options.parse_args()
    import torch

    peak = peak_flops(torch.cuda.get_device_name())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    cells = [
        (row, side) for row in ROWS for side in row.sides
        if (not given.rows or row.name in given.rows) and (not given.sides or side in given.sides)
        and available(side, given)
    ]  # fmt: skip
    results = json.loads(given.out.read_text()) if given.out and given.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        waiting: dict[tuple[str, str], tuple[subprocess.Popen, Any]] = {}
        pending = [(row, side) for row, side in cells if not side.startswith("posttrain")]
        for row, side in cells:
            while pending and len(waiting) < MOST_WAITING:
                ahead, peer = pending.pop(0)
                log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with this process)
                waiting[ahead.name, peer] = start(peer, ahead, given.steps, given, log), log
            began = time.perf_counter()
            if side == "posttrain":
                result = ours(row, given.data.resolve(), given.tokenizer.resolve(), given.steps, work)
            elif side == "posttrain-full-length":
                rows = given.steps * row.micro * row.accumulation
                write_full_length(work / "full_length.jsonl", given.tokenizer, row.length, rows)
                result = ours(row, work / "full_length.jsonl", given.tokenizer.resolve(), given.steps, work)
            else:
                process, log = waiting.pop((row.name, side))
                result = finish(process, row, peak, log, given.limit)
            result = {"row": row.name, "side": side, **result}
            results.append(result)
            shown = result.get("error") or f"{result['tok_s']:9,.0f} tok/s {result['peak_gib']:6.1f} GiB"
            print(f"{row.name:12} {side:22} {shown}  ({time.perf_counter() - began:.0f} s)", flush=True)
            if given.out:
                given.out.write_text(json.dumps(results, indent=1))
    show(results)


if __name__ == "__main__":
    main()
