"""Planned and measured peak memory of short runs on one GPU, side by side.

    python bench/memory.py TOKENIZER_DIR [--parallel 3] [--only NAME ...] [--out results.json]

Each setting is a whole `python -m posttrain` of a few steps, on random weights and on made-up conversations that are
packed (or not) as real ones are; the plan is `posttrain.plan`'s for the same words. TOKENIZER_DIR: a fast tokenizer of
at most 32,768 tokens (Mistral-7B has no more embeddings; leave it out by --only with a larger one). Several runs at
once save time, most of which is their start; their speeds then mean nothing.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STEPS = 6
# Name -> words of the command; a step has two micro-batches.
SETTINGS = {
    "1B LoRA, 1 x 4096": ["model=llama32_1b"],
    "1B LoRA, 4 x 4096": ["model=llama32_1b", "trainer.micro_batch_size=4"],
    "1B LoRA unpacked, 8 x 1024": [
        "model=llama32_1b", "data.packing=false", "trainer.seq_length=1024", "trainer.micro_batch_size=8",
    ],
    "1B LoRA on q and v, 2 x 2048": [
        "model=llama32_1b", "peft.target_modules=[q_proj,v_proj]", "trainer.seq_length=2048",
        "trainer.micro_batch_size=2",
    ],
    "1B DoRA, 1 x 4096": ["model=llama32_1b", "peft=dora"],
    "1B all weights, 2 x 2048": [
        "model=llama32_1b", "peft=none", "trainer.seq_length=2048", "trainer.micro_batch_size=2",
    ],
    "1B all weights, recompute, 4 x 4096": [
        "model=llama32_1b", "peft=none", "trainer.recompute=full", "trainer.micro_batch_size=4",
    ],
    "3B LoRA, 2 x 4096": ["model=llama32_3b", "trainer.micro_batch_size=2"],
    "3B LoRA, recompute, 4 x 4096": ["model=llama32_3b", "trainer.recompute=full", "trainer.micro_batch_size=4"],
    "8B LoRA, 1 x 2048": ["model=llama3_8b", "trainer.seq_length=2048"],
    "Mistral-7B LoRA, fp8, 2 x 2048": [
        "model=mistral_7b_v03", "precision=fp8", "trainer.seq_length=2048", "trainer.micro_batch_size=2",
    ],
    "SmolLM2-135M all weights, 8 x 2048": [
        "model=smollm2_135m", "peft=none", "trainer.seq_length=2048", "trainer.micro_batch_size=8",
    ],
    "SmolLM2-135M LoRA, fp32, unpacked, 4 x 512": [
        "model=smollm2_135m", "precision=fp32", "data.packing=false", "trainer.seq_length=512",
        "trainer.micro_batch_size=4",
    ],
    "Qwen3-0.6B LoRA, 4 x 2048": ["model=qwen3_0b6", "trainer.seq_length=2048", "trainer.micro_batch_size=4"],
    "Qwen3-4B LoRA, 1 x 4096": ["model=qwen3_4b"],
    "Qwen2.5-0.5B all weights, 2 x 4096": ["model=qwen25_0b5", "peft=none", "trainer.micro_batch_size=2"],
    "Gemma-2B LoRA, 1 x 4096": ["model=gemma_2b"],
    "Pythia-1B all weights, 2 x 2048": [
        "model=pythia_1b", "peft=none", "trainer.seq_length=2048", "trainer.micro_batch_size=2",
    ],
}  # fmt: skip


def conversations(file: Path, count: int = 3000) -> None:
    """Write made-up questions and answers, of which somewhat more than half is answer; the same each time."""
    pick = random.Random(0)
    words = ["".join(pick.choices("aeioulnrst", k=pick.randint(2, 9))) for _ in range(500)]
    with file.open("w") as stream:
        for _ in range(count):
            prompt, completion = (" ".join(pick.choices(words, k=max(3, int(pick.gauss(n, n / 2))))) for n in (25, 35))
            stream.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def words_of(name: str, folder: Path, tokenizer: str) -> list[str]:
    """The words of a setting's command, data and brevity included."""
    words = SETTINGS[name]
    given = dict(word.partition("=")[::2] for word in words)
    micro = int(given.get("trainer.micro_batch_size", 1))
    return [
        "data=prompt_completion", f"data.path={folder / 'data.jsonl'}", "template=alpaca", "model.random_init=true",
        f"model.tokenizer={tokenizer}", f"trainer.max_steps={STEPS}", f"trainer.global_batch_size={2 * micro}",
        "trainer.num_generations=0", "trainer.export=false", "checkpoint.save=false", f"cache_dir={folder / 'cache'}",
        *words,
    ]  # fmt: skip


def measured(name: str, words: list[str], run: Path) -> dict:
    """Train; what summary.json says, or how it failed."""
    began = time.time()
    command = [sys.executable, "-m", "posttrain", *words, f"hydra.run.dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-600:], "log": tail(run)}
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line][3:]
    return {
        "peak_gib": summary["peak_memory_gib"], "reserved_gib": summary.get("reserved_memory_gib"),
        "planned_in_run_gib": summary.get("memory_planned_gib"), "tokens_per_second": statistics.median(speeds),
        "seconds": round(time.time() - began, 1),
    }  # fmt: skip


def tail(run: Path) -> str:
    """The end of the first rank's log."""
    log = run / "logs" / "rank0.log"
    return log.read_text()[-1500:] if log.exists() else ""


def planned(words: list[str]) -> dict:
    """The plan, made as a user's is."""
    from posttrain.config.composition import compose
    from posttrain.plan.report import build_plan
    from posttrain.utils.gpus import detect_gpus, find_gpu

    cfg = compose([*words, "parallelism=single"])
    found = build_plan(cfg, 1, (detect_gpus() or [find_gpu("h200")])[0])
    return {"planned_gib": found["memory_gib"]["peak"], "needed_gib": found["memory_gib"]["needed"],
            "parts": found["memory_gib"]["parts"], "data": found["data"],
            "planned_tokens_per_second": found["speed"]["tokens_per_second"]}  # fmt: skip


def used_mib() -> int | None:
    """What the driver says is taken on the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("tokenizer", help="a fast tokenizer's directory")
    options.add_argument("--parallel", type=int, default=1, help="runs at once")
    options.add_argument("--only", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    options.add_argument("--plan-only", action="store_true", help="no runs")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    if too_small := [name for name in given.only if "Mistral" in name and tokens_of(given.tokenizer) > 32768]:
        options.error(f"{given.tokenizer} has more tokens than 32,768: too many for {', '.join(too_small)}; see --only")
    began, idle, rows = time.time(), used_mib(), {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(given.parallel) as pool:
        folder = Path(name)
        conversations(folder / "data.jsonl")
        commands = {name: words_of(name, folder, given.tokenizer) for name in given.only}
        runs = {} if given.plan_only else {
            name: pool.submit(measured, name, words, folder / str(number))
            for number, (name, words) in enumerate(commands.items())
        }  # fmt: skip
        plans = {name: planned(words) for name, words in commands.items()}
        context = None
        if runs and given.parallel == 1:  # the driver's number while one run holds the GPU
            most = 0
            while not all(run.done() for run in runs.values()):
                most = max(most, used_mib() or 0)
                time.sleep(0.5)
            context = most - (idle or 0)
        for name, plan in plans.items():
            rows[name] = plan | (runs[name].result() if runs else {})
            print(line(name, rows[name]), flush=True)
    within = [abs(row["planned_gib"] / row["peak_gib"] - 1) <= 0.1 for row in rows.values() if "peak_gib" in row]
    print(f"{sum(within)} of {len(within)} within 10 %; {time.time() - began:.0f} s")
    if given.out:
        result = {"settings": rows, "most_used_mib": context, "idle_mib": idle, "words": SETTINGS}
        given.out.write_text(json.dumps(result, indent=2))


def tokens_of(directory: str) -> int:
    """Tokens that a tokenizer has, special ones included."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(directory) / "tokenizer.json")).get_vocab_size()


def line(name: str, row: dict) -> str:
    """A row of the table, in Markdown."""
    plan = f"{row['planned_gib']:.2f}"
    if "error" in row:
        return f"| {name} | failed: {(row['error'].splitlines() or ['?'])[-1]} | {plan} | |"
    if "peak_gib" not in row:
        return f"| {name} | | {plan} | |"
    return f"| {name} | {row['peak_gib']:.2f} | {plan} | {row['planned_gib'] / row['peak_gib'] - 1:+.1%} |"


if __name__ == "__main__":
    main()
