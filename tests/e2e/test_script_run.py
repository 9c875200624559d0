"""scripts/posttrain.sh for real: train an adapter, then export the run merged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[2]


def test_train_and_export(tiny, posttrain, tmp_path):
    variables = {
        "MODEL": str(tiny), "DATA": str(tiny / "data.jsonl"), "TEMPLATE": "model", "OUT": str(tmp_path / "run"),
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "POSTTRAIN_CACHE": str(posttrain.cache),
    }  # fmt: skip
    words = ["trainer.max_steps=2", "trainer.global_batch_size=4", "trainer.seq_length=128"]
    command = [ROOT / "scripts" / "posttrain.sh", "chat", *words, "trainer.num_generations=0"]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2

    variables |= {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "merged")}
    command = [ROOT / "scripts" / "posttrain.sh", "export"]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
