"""Kernels of activations and norms against their definitions, in Triton's interpreter; on a GPU: test_kernels.py."""

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("elementwise_reference.py")


def test_kernels_are_the_definition():
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", WORKER], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
