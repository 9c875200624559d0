"""Step time of the default run on a CPU beside a plain transformers + peft loop over the same rows.

    python bench/cpu_step.py [--steps 12] [--repeats 3] [WORDS ...]

WORDS are for `python -m posttrain`. The plain loop is what one writes by hand: PeftModel, one packed row per
micro-batch, cross entropy of the supervised tokens, AdamW, in fp32 with as many threads. Each measurement is a fresh
process, the two take turns, and the first two steps don't count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SKIPPED = 2


def ours(run_dir: Path, steps: int, words: list[str]) -> list[float]:
    """Seconds of each step of `python -m posttrain`."""
    command = [sys.executable, "-m", "posttrain", f"trainer.max_steps={steps}", "trainer.num_generations=0",
               "trainer.export=false", "checkpoint.save=false", f"hydra.run.dir={run_dir}", *words]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if "loss" in line][SKIPPED:]


def write_rows(run_dir: Path) -> None:
    """The rows of that run in the order of its steps, its model and adapter, to RUN_DIR/rows.pt."""
    import torch

    from posttrain.launch.worker import build
    from posttrain.train.batches import TrainOrder

    run = build(run_dir).prepare()
    batch = run.settings.global_batch_size
    order = TrainOrder(run.splits.train, batch, run.steps, run.config.seed, None, blank={})
    rows = []
    for index in range(run.steps * batch):
        row = order[index]
        rows.append({key: torch.as_tensor(row[key]).long() for key in ("input_ids", "labels", "loss_mask")})
    peft = run.config.peft
    kept = {
        "rows": rows,
        "batch": batch,
        "model": str(run.groups.model.directory),
        "rank": peft.rank,
        "alpha": peft.alpha or 2 * peft.rank,
        "lr": run.groups.optimizer.lr,
    }
    torch.save(kept, run_dir / "rows.pt")


def plain(run_dir: Path) -> None:
    """Train on those rows with transformers and peft; print the seconds of each step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    kept = torch.load(run_dir / "rows.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(kept["model"], dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=kept["rank"], lora_alpha=kept["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=kept["lr"], weight_decay=0.0)
    seconds = []
    for start in range(0, len(kept["rows"]), kept["batch"]):
        began = time.perf_counter()
        rows = kept["rows"][start : start + kept["batch"]]
        tokens = sum(row["loss_mask"].sum() for row in rows)
        for row in rows:
            logits = model(row["input_ids"][None]).logits[0]
            each = torch.nn.functional.cross_entropy(logits, row["labels"], reduction="none")
            ((each * row["loss_mask"]).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["rows", "plain"], help=argparse.SUPPRESS)
    given, words = parser.parse_known_args()
    if given.part:
        return {"rows": write_rows, "plain": plain}[given.part](Path(words[0]))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "POSTTRAIN_DEVICE": "cpu"}
    found: dict[str, list[float]] = {"posttrain": [], "transformers + peft": []}
    with tempfile.TemporaryDirectory() as work:
        for repeat in range(given.repeats):
            run_dir = Path(work, str(repeat))
            found["posttrain"] += ours(run_dir, given.steps, words)
            part = [sys.executable, __file__, "--part"]
            if not repeat:
                subprocess.run([*part, "rows", run_dir], env=os.environ | alone, check=True, stdout=sys.stderr)
            done = subprocess.run([*part, "plain", Path(work, "0")], check=True, stdout=subprocess.PIPE, text=True)
            found["transformers + peft"] += json.loads(done.stdout.splitlines()[-1])[SKIPPED:]
    for name, seconds in found.items():
        print(f"{name}: {statistics.median(seconds):.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f})")
    ratio = statistics.median(found["posttrain"]) / statistics.median(found["transformers + peft"])
    print(f"posttrain takes {ratio:.2f} of the plain loop's time")


if __name__ == "__main__":
    main()
