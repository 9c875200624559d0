"""transformers and PEFT with Liger's kernels."""

from typing import Any

from liger_kernel.transformers import apply_liger_kernel_to_llama

from posttrain.bench import peer_hf
from posttrain.bench.workloads import Workload


def run(workload: Workload, steps: int) -> dict[str, Any]:
    """Train with them in the place of transformers' own layers."""
    apply_liger_kernel_to_llama()
    return peer_hf.run(workload, steps)
