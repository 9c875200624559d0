"""Queries, keys and values in one pass: the kernels against the definition, in Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rotary_reference import CASES, differences

WORKER = Path(__file__).with_name("rotary_reference.py")


def test_kernels_are_the_definition():
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", WORKER], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case):
    """In bf16, rounded once."""
    if not torch.cuda.is_available() or str(torch.cuda.current_device()) == "cpu":
        pytest.skip("no GPU")
    assert max(differences(case, "cuda", torch.bfloat16, tokens=300)) < 4e-3
