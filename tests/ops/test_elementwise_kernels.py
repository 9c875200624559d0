"""Kernels against their definitions, in Triton's interpreter; on a GPU: test_kernels.py and others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("worker", ["elementwise_reference.py", "expert_kernels_reference.py", "capped_reference.py"])
def test_kernels_are_the_definition(worker):
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / worker], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
