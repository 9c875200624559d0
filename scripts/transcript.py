"""The transcript of docs/session.md: each command on the real SmolLM2 and real data, its output between two markers.

    python scripts/transcript.py            run everything (two minutes on two quiet cores), rewrite the page
    python scripts/transcript.py --check    run everything, compare with the page; exit code 1 where they differ

Needs the extra `demo` and the optional shared test data (POSTTRAIN_SHARED, else ../shared).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "session.md"
BEGIN, END = "<!-- transcript: scripts/transcript.py -->", "<!-- end of transcript -->"
DATA = {"alpaca.json": "alpaca/identity.json", "gsm8k.jsonl": "eval/gsm8k_train.jsonl"}
DATA_WORDS = "data=alpaca data.path=alpaca.json data.validation_fraction=0.05"
SMALL = "trainer.global_batch_size=4 trainer.seq_length=128 trainer.max_steps=2"
PRIMUS = """\
framework: megatron_bridge
hf_model_name_or_path: Qwen/Qwen3-8B
lora: {use_lora: true, lora_rank: 16, lora_alpha: 32}
training: {train_iters: 500, lr: 1.0e-4, global_batch_size: 32, seq_length: 4096}
"""
COMMANDS = [
    "python -m posttrain.doctor | sed -n 2,7p",
    "python -m posttrain.preview data=alpaca data.path=alpaca.json preview.limit=1",
    "python -m posttrain.plan model=llama3_8b data=alpaca data.path=alpaca.json trainer.max_steps=500 \\\n"
    "    plan.gpu=h100 plan.gpus=1 plan.read_data=false | head -n 10",
    f"python -m posttrain {DATA_WORDS} \\\n    {SMALL} \\\n"
    "    trainer.num_generations=1 trainer.max_new_tokens=12 hydra.run.dir=outputs/alpaca",
    "python -m posttrain.generate outputs/alpaca 'Who are you?' --max-new-tokens 24",
    "python -m posttrain.evaluate outputs/alpaca data=prompt_completion data.path=gsm8k.jsonl \\\n"
    "    data.format.prompt=question data.format.completion=answer trainer.seq_length=512 evaluate.limit=8 \\\n"
    "    evaluate.out=outputs/gsm8k",
    "python -m posttrain.convert export checkpoint=outputs/alpaca convert.out=adapter",
    "python -m posttrain.convert merge checkpoint=outputs/alpaca convert.out=merged",
    f"python -m posttrain --multirun {DATA_WORDS} \\\n    {SMALL} \\\n"
    "    trainer.num_generations=0 optimizer.lr=1e-4,1e-3 sweep.name=alpaca | tail -n 11",
    "python -m posttrain.report outputs/sweeps/alpaca",
    "python -m posttrain recipe=list | grep llama32_1b",
    "python -m posttrain.primus qwen3_lora.yaml",
    "python -m posttrain.generate outputs/nowhere hello",
    "truncate --size=100000 adapter/adapter_model.safetensors; python -m posttrain.generate adapter hello",
    "python -m posttrain recipe=llama32_1b_peft_1gpu_h100_bf61_config",
]
# Figures that are another machine's or moment's: times, rates, memory and room, and what is derived from them.
VARYING = re.compile(
    r"(?:\d[\d,.]* (?:h|min|s)\b ?)+"
    r"|\d[\d,.]*(?= ?(?:ms|%|x|[KMG]i?B|tok/s|supervised tok/s|per second|tokens/s)\b)"
    r"|(?<=tok/s of )[\d,]+"
    r"|[\d,.]+(?:\s+[\d,.]+){2}(?=\s+finished)"  # a sweep's table: tok/s, GiB, training seconds
)
# What is said of a phase where it takes long, which it does on a busy machine alone: `importing  10 s`.
PHASE = re.compile(r"[a-z][a-z ,]*(?: \d+/\d+)?  (?:\d+ (?:h|min|s) ?)+")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def shared() -> Path:
    """The folder of optional shared test data."""
    return Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared"))


def run() -> str:
    """Run every command in an empty folder; returns the transcript."""
    with tempfile.TemporaryDirectory(prefix="transcript") as folder:
        for name, path in DATA.items():
            (Path(folder) / name).symlink_to((shared() / "data" / path).resolve())
        (Path(folder) / "qwen3_lora.yaml").write_text(PRIMUS)
        return "\n\n".join(shown(command, Path(folder)) for command in COMMANDS)


def shown(command: str, folder: Path) -> str:
    """A command and what it prints, as on a terminal of 100 columns; its exit code where it isn't 0."""
    env = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "COLUMNS": "100", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    said = done.stdout + (done.stderr if done.returncode else "")
    said = said.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".")
    lines = [f"$ {command}", *(line.rstrip() for line in said.strip("\n").splitlines())]
    lines = [line for line in lines if not PHASE.fullmatch(line)]
    return "\n".join(lines + ([f"(exit code {done.returncode})"] if done.returncode else []))


def differences(old: str, new: str) -> list[str]:
    """Pairs of lines that say something else: words are equal, numbers within 2 %, figures of the machine any."""
    old_lines, new_lines = old.splitlines(), new.splitlines()
    if len(old_lines) != len(new_lines):
        return [f"{len(old_lines)} lines before, {len(new_lines)} now"]
    return [f"- {a}\n+ {b}" for a, b in zip(old_lines, new_lines, strict=True) if not _same(a, b)]


def _same(old: str, new: str) -> bool:
    old, new = VARYING.sub("", old), VARYING.sub("", new)
    if [text.split() for text in NUMBER.split(old)] != [text.split() for text in NUMBER.split(new)]:
        return False
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) for a, b in values)


def in_page() -> str:
    """The transcript that the page has."""
    return re.search(f"{re.escape(BEGIN)}\n```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL)[1]


def main() -> None:
    """Rewrite the page's transcript, or compare with it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="compare instead of writing")
    check = options.parse_args().check
    new = run()
    if check:
        found = differences(in_page(), new)
        print("\n".join(found) or "as in docs/session.md")
        raise SystemExit(bool(found))
    block = f"{BEGIN}\n```text\n{new}\n```\n{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: block, PAGE.read_text()))


if __name__ == "__main__":
    main()
