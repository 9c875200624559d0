"""bench/peers.py: a tiny model is trained by Transformers and PEFT for real, in one process and sharded over two."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from jobs import Job  # noqa: E402
from peers import line, result, work_of  # noqa: E402

ROWS = yaml.safe_load((BENCH / "peers.yaml").read_text())
SCALING = yaml.safe_load((BENCH / "scaling.yaml").read_text())
TINY = [
    "model.architecture.num_hidden_layers=1",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=1",
    "model.architecture.vocab_size=64",
    "trainer.seq_length=16",
]


def measure(row: str, out: Path) -> list[str]:
    """Time a tiny model on a row's work; the cells of its line, without the row's name."""
    command = [sys.executable, str(BENCH / "peers.py"), *TINY, "--gpus", "2", "--steps", "7", "--out", str(out)]
    command += ["--rows", row]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].strip("| ").split(" | ")[1:]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("row", "gpus"), [("8b_hf", 1), ("8b_hf_fsdp2", 2)])
def test_speed_is_that_of_the_median_step(row, gpus, tmp_path):
    cells = measure(row, tmp_path / "out")
    ranks = [json.loads((tmp_path / "out" / row / f"rank{rank}.json").read_text()) for rank in range(gpus)]
    assert [len(rank["seconds"]) for rank in ranks] == [7] * gpus
    step = statistics.median(ranks[0]["seconds"][5:])
    tokens = 8 * 16  # rows of a step, tokens of a row
    assert cells[1] == str(gpus)
    assert cells[2] == f"{tokens / step / gpus:,.0f}"


@pytest.mark.slow
@pytest.mark.nightly
def test_a_failure_is_a_line(tmp_path):
    cells = measure("gemma2_2b_hf", tmp_path / "out")
    assert "NotImplementedError: FlexAttention does not support backward on CPU" in cells[2]


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_work_that_their_peer_does(row):
    peer = ROWS[row]["peer"]
    work = work_of(ROWS[row], SCALING[ROWS[row]["work"]], ["trainer.max_steps=9"], 9)
    replicas = work.gpus // (work.tensor_parallel * work.pipeline_parallel)
    assert work.accumulation * work.micro_batch * replicas == work.global_batch
    assert (BENCH / f"peer_{peer}.py").is_file()
    assert peer == "bridge" or replicas == work.gpus
    assert peer != "unsloth" or work.gpus == 1
    assert (work.rank, work.alpha) == (None if "_full_" in row else 16, 32)


def test_mfu_and_memory_of_two_processes(tmp_path):
    work = work_of(ROWS["8b_hf_fsdp2"], SCALING["8b_ddp2"], [], 7)
    for rank, peak in enumerate((30.0, 31.0)):
        found = {
            "seconds": [9.0] * 5 + [2.0, 1.0],
            "device": "NVIDIA H200",
            "peak_gib": peak,
            "reserved_gib": 40.0 - rank,
        }
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(found))
    job = Job("8b_hf_fsdp2", [], 2, tmp_path / "log")
    # Operations of frozen weights and of causal attention (PaLM, arXiv 2204.02311, appendix B); an H200: 989 TFLOP/s.
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    rate = 8 * 4096 / 1.5  # tokens a second of both
    mfu = rate * (4 * weights + 6 * 32 * 4096 * 4096) / (2 * 989e12)
    cells = line(job, "transformers", work, result(tmp_path, job, work)).strip("| ").split(" | ")
    assert cells[1:] == ["Transformers + PEFT + FSDP2", "2", f"{rate / 2:,.0f}", f"{mfu:.0%}", "31.0, 40.0", "1,500"]
