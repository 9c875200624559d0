"""Whole commands on a tiny model: what a user types, in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_model
from commands import Result, environment


def pytest_collection_modifyitems(items):
    """Everything in this folder starts whole commands."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama of 4 layers with random weights, its tokenizer, and data.jsonl of 60 short conversations."""
    return tiny_model.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def words(tiny) -> list[str]:
    """The words of a short run on the tiny model."""
    return [
        "model=hf", f"model.path={tiny}", "data=messages", f"data.path={tiny / 'data.jsonl'}",
        "data.validation_fraction=0.1", "trainer.seq_length=128", "trainer.global_batch_size=4", "trainer.max_steps=4",
        "trainer.num_generations=0", "optimizer.lr=1e-2", "scheduler=constant",
        "peft.target_modules=[q_proj,v_proj,down_proj]",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def posttrain(tmp_path_factory):
    """Run `python -m posttrain WORDS` to its end; returns a Result."""
    own_cache = tmp_path_factory.mktemp("cache")

    def run(*words: str, run_dir: Path | None = None, timeout: float = 500, cache: Path = own_cache) -> Result:
        run_dir = run_dir or tmp_path_factory.mktemp("run") / "run"
        command = [sys.executable, "-m", "posttrain", *words, f"hydra.run.dir={run_dir}"]
        # From another folder than the checkout's, as an installed package would be used.
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(cache),
            cwd=run_dir.parent, timeout=timeout,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr, run_dir)

    run.cache = own_cache
    return run


@pytest.fixture
def started(started_with, words):
    """Start a run of `words` that would take many steps; returns (process, run directory) once it is training."""
    return lambda *more: started_with([*words, *more])


@pytest.fixture
def started_with(posttrain, tmp_path):
    """As `started`, of other words."""
    begun = []

    def start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        run_dir = tmp_path / "run"
        command = [sys.executable, "-m", "posttrain", *words, "trainer.max_steps=100000",
                   f"hydra.run.dir={run_dir}"]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, text=True, cwd=tmp_path, env=environment(posttrain.cache),
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
