"""Whole commands on a tiny model: what a user types, in a process of its own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data"))  # the small tokenizer


def pytest_collection_modifyitems(items):
    """Everything in this folder starts whole commands."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@dataclass
class Result:
    """A finished command."""

    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics if "loss" in line]

    def log(self, rank: int = 0) -> str:
        path = self.run_dir / "logs" / f"rank{rank}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama of 4 layers with random weights, its tokenizer, and data.jsonl of 60 short conversations."""
    import torch
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    with open(directory / "data.jsonl", "w") as file:
        for i in range(60):
            turns = [("user", f"say {i} " + "la " * (i % 5)), ("assistant", f"number {i}, hello world")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return directory


@pytest.fixture(scope="session")
def words(tiny) -> list[str]:
    """The words of a short run on the tiny model."""
    return [
        "model=hf", f"model.path={tiny}", "data=messages", f"data.path={tiny / 'data.jsonl'}",
        "data.validation_fraction=0.1", "trainer.seq_length=128", "trainer.global_batch_size=4", "trainer.max_steps=4",
        "trainer.samples=0", "optimizer.lr=1e-2", "scheduler=constant", "peft.target_modules=[q_proj,v_proj,down_proj]",
    ]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    """The test's own environment with this checkout importable, a cache of its own and one thread per process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ, "PYTHONPATH": path, "POSTTRAIN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


@pytest.fixture(scope="session")
def posttrain(tmp_path_factory):
    """Run `python -m posttrain WORDS` to its end; returns a Result."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*words: str, run_dir: Path | None = None, timeout: float = 500) -> Result:
        run_dir = run_dir or tmp_path_factory.mktemp("run") / "run"
        command = [sys.executable, "-m", "posttrain", *words, f"hydra.run.dir={run_dir}"]
        # From another folder than the checkout's, as an installed package would be used.
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(cache),
            cwd=run_dir.parent, timeout=timeout,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr, run_dir)

    run.cache = cache
    return run


@pytest.fixture
def started(started_with, words):
    """Start a run of `words` that would take many steps; returns (process, run directory) once it is training."""
    return lambda *more: started_with([*words, *more])


@pytest.fixture
def started_with(posttrain, tmp_path):
    """As `started`, of other words."""
    begun = []

    def start(words):
        run_dir = tmp_path / "run"
        command = [sys.executable, "-m", "posttrain", *words, "trainer.max_steps=100000",
                   f"hydra.run.dir={run_dir}"]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=environment(posttrain.cache),
        )  # fmt: skip
        begun.append(process)
        deadline = time.monotonic() + 240
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return process, run_dir

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()


def finish(process, run_dir):
    """Wait for the end; nothing may be left running."""
    out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 20
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return Result(process.returncode, out, err, run_dir)


def workers(process):
    """The ranks' processes, by rank."""
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))
