"""Rows per second from files to packed training data, ours and TRL's SFTTrainer, measured side by side.

    uv venv /path/to/trl && uv pip install --python /path/to/trl/bin/python trl psutil   # TRL is no dependency of ours
    python bench/data_throughput.py --trl-python /path/to/trl/bin/python --tokenizer DIR --rows 100000 FILE...

Each FILE (Alpaca JSON, or JSON Lines with question and answer) is repeated up to `--rows` rows in one conversational
JSON Lines file. Both sides then do the same on the same cores, each in a fresh process with an empty cache: chat
template, token ids, mask of the assistant's answers, packing (best-fit decreasing) into `--seq-length`, written to
disk. Reading the JSON counts for us and not for TRL. TRL runs with one and with two processes; the better one counts.
Reported are the median of `--repeats` alternating runs, rows/s, and the largest memory of all processes of a side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

# Both sides render this. TRL finds the answers by the {% generation %} marks; ours does not need them.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with ChatML's tokens")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        {"ours": ours, "trl": trl}[args.side](args)
        return
    for source in args.files:
        with tempfile.TemporaryDirectory() as folder:
            path = repeated(source, args.rows, Path(folder) / "rows.jsonl")
            runs: dict[str, list[dict]] = {"ours": [], "trl 1 process": [], "trl 2 processes": []}
            for _ in range(args.repeats):
                for name, found in runs.items():
                    side, processes = name.split()[0], int("2" in name) + 1
                    python = sys.executable if side == "ours" else args.trl_python
                    found.append(measured(args, python, path, side, processes))
            report(source.name, args.rows, runs)


def repeated(source: Path, rows: int, out: Path) -> Path:
    """Write the conversations of `source` over and over, `rows` in all."""
    text = source.read_text()
    given = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    lines = []
    for row in given:
        asked = row.get("question") or "\n\n".join(filter(None, (row.get("instruction"), row.get("input"))))
        answer = row.get("answer") or row.get("output")
        if answer:
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages}) + "\n")
    with out.open("w") as file:
        file.writelines(lines[i % len(lines)] for i in range(rows))
    return out


def measured(args: argparse.Namespace, python: str, path: Path, side: str, processes: int) -> dict:
    """One run in a fresh process: its own report, and the peak memory of it and its children."""
    with tempfile.TemporaryDirectory() as cache:
        words = [str(path), "--trl-python", "-", "--tokenizer", args.tokenizer, "--seq-length", str(args.seq_length)]
        command = [python, __file__, *words, "--side", side, "--processes", str(processes)]
        environment = {"HF_HOME": cache, "POSTTRAIN_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        # For the children's modules only: the bench itself is run from a checkout.
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent) if side == "ours" else ""
        environment |= {
            key: value for key, value in __import__("os").environ.items() if key in ("PATH", "HOME", "TMPDIR")
        }
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        peak, done = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(child.pid, peak, done))
        watcher.start()
        out, _ = child.communicate()
        done.set()
        watcher.join()
        if child.returncode:
            raise SystemExit(f"{side} failed: run {' '.join(command)}")
        return {**json.loads(out.splitlines()[-1]), "peak_gb": peak[0] / 1e9}


def watch(pid: int, peak: list[int], done: threading.Event) -> None:
    """The largest proportional memory (PSS: shared pages counted once) of a process and its children."""
    while not done.wait(0.2):
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            used = sum(member.memory_full_info().pss for member in family)
        except psutil.Error:
            continue
        peak[0] = max(peak[0], used)


def ours(args: argparse.Namespace) -> None:
    """Print seconds, tokens and bins of TrainingData.build."""
    import os

    from transformers import AutoTokenizer

    from posttrain.data import TrainingData
    from posttrain.data.formats import Messages
    from posttrain.data.templates import ChatTemplate
    from posttrain.objectives import SFT

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.chat_template = TEMPLATE
    data = TrainingData(format=Messages(), path=str(args.files[0]), truncation="drop")
    cache = Path(os.environ["POSTTRAIN_CACHE"])
    start, cpu = time.perf_counter(), cpu_seconds()
    encoder = SFT().encoder(data, ChatTemplate(), tokenizer, args.seq_length)
    built = data.build(encoder=encoder, seq_length=args.seq_length, seed=0, cache_dir=cache)
    seconds = time.perf_counter() - start
    train = built.report["train"]
    print(json.dumps(result(seconds, cpu, train["tokens"], train["supervised_tokens"], train["packed_sequences"])))


def trl(args: argparse.Namespace) -> None:
    """Print seconds, tokens and bins of SFTTrainer's preparation of the data set."""
    import tempfile

    from datasets import load_dataset
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.chat_template = TEMPLATE
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **shape))
    rows = load_dataset("json", data_files=str(args.files[0]), split="train")
    spent = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *given, **named):
            start, cpu = time.perf_counter(), cpu_seconds()
            prepared = super()._prepare_dataset(*given, **named)
            spent["seconds"], spent["cpu"] = time.perf_counter() - start, cpu
            spent["used"] = cpu_seconds() - cpu
            return prepared

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            packing=True,
            max_length=args.seq_length,
            dataset_num_proc=args.processes if args.processes > 1 else None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = Timed(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    prepared = trainer.train_dataset.with_format("arrow")
    tokens = supervised = 0
    for batch in prepared.iter(1000):
        import pyarrow.compute as pc

        tokens += len(batch["input_ids"].combine_chunks().flatten())
        labels = batch["labels"].combine_chunks().flatten()
        supervised += pc.sum(pc.not_equal(labels, -100)).as_py()
    found = result(spent["seconds"], spent["cpu"], tokens, supervised, len(prepared))
    print(json.dumps({**found, "cpu_seconds": spent["used"]}))


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    times = psutil.Process().cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def result(seconds: float, cpu: float, tokens: int, supervised: int, bins: int) -> dict:
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "packed_sequences": bins,
    }


def report(name: str, rows: int, runs: dict[str, list[dict]]) -> None:
    """Print a Markdown table of one file."""
    print(f"\n### {name}, {rows:,} rows\n")
    print("| | rows/s | seconds (runs) | CPU seconds | peak memory, GB | tokens | supervised | bins |")
    print("|---|---|---|---|---|---|---|---|")
    speed = {}
    for side, found in runs.items():
        seconds = [run["seconds"] for run in found]
        speed[side] = rows / statistics.median(seconds)
        each = ", ".join(f"{value:.1f}" for value in seconds)
        cpu = statistics.median(run["cpu_seconds"] for run in found)
        peak = max(run["peak_gb"] for run in found)
        last = found[-1]
        counts = " | ".join(f"{last[key]:,}" for key in ("tokens", "supervised_tokens", "packed_sequences"))
        print(f"| {side} | {speed[side]:,.0f} | {each} | {cpu:.1f} | {peak:.2f} | {counts} |")
    best = max(value for side, value in speed.items() if side != "ours")
    print(f"\nours / the better TRL: {speed['ours'] / best:.1f}x", flush=True)


if __name__ == "__main__":
    main()
