"""transformers and PEFT."""

from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401  (before its turn)
from peft import LoraConfig, get_peft_model

from posttrain.bench.peer_loop import random_model, run_loop, wait_for_turn
from posttrain.bench.workloads import RANK, Workload


def run(workload: Workload, steps: int) -> dict[str, Any]:
    """Train with SDPA's flash kernel."""
    wait_for_turn()
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return run_loop(workload, get_peft_model(random_model(workload), adapter), steps)
