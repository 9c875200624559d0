"""What a trial of a sweep costs besides its training: the same small grid with one process that imports, and without.

    python bench/sweep.py MODEL_DIR ROWS.jsonl [--trials 4] [--steps 4]

Each grid is a command of its own, in turns; the adapters of both must be the same to the bit.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = {"each trial imports": "launch.prestart=false", "one process imports": "launch.prestart=null"}


def run(words: list[str], folder: Path) -> float:
    """Run a grid into `folder`; returns its seconds."""
    command = [sys.executable, "-m", "posttrain", "--multirun", *words, f"hydra.sweep.dir={folder}"]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    rates = ",".join(f"{number}e-3" for number in range(1, options.trials + 1))
    words = [
        "model=hf",
        f"model.path={options.model.resolve()}",
        "data=messages",
        f"data.path={options.rows.resolve()}",
        "data.validation_fraction=0.1",
        "trainer.seq_length=128",
        "trainer.global_batch_size=4",
        f"trainer.max_steps={options.steps}",
        "trainer.num_generations=0",
        f"optimizer.lr={rates}",
    ]
    found = []
    with tempfile.TemporaryDirectory(prefix="sweep") as folder:
        for number, (kind, word) in enumerate(KINDS.items()):
            target = Path(folder, str(number))
            print(f"{kind}: {run([*words, word], target):.0f} s for {options.trials} trials", flush=True)
            weights = sorted(target.glob("*/adapter/adapter_model.safetensors"))
            found.append([(path.parents[1].name, path.read_bytes()) for path in weights])
    assert len(found[0]) == options.trials
    print("adapters equal to the bit:", found[0] == found[1])


if __name__ == "__main__":
    main()
