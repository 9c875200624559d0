"""Unsloth; it requires a directory with weights and tokenizer."""

import os
import tempfile
from typing import Any

import unsloth  # noqa: F401  (before transformers)
from unsloth import FastLanguageModel

# isort: split
import torch
from transformers import AutoTokenizer

from posttrain.bench.peer_loop import random_model, run_loop, wait_for_turn
from posttrain.bench.workloads import RANK, Workload


def run(workload: Workload, steps: int) -> dict[str, Any]:
    """Train without gradient checkpointing."""
    wait_for_turn()
    with tempfile.TemporaryDirectory() as folder:
        random_model(workload).save_pretrained(folder)
        AutoTokenizer.from_pretrained(os.environ["POSTTRAIN_BENCH_TOKENIZER"]).save_pretrained(folder)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            model_name=folder,
            max_seq_length=workload.length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            local_files_only=True,
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        bias="none",
        random_state=0,
        target_modules=names,
        use_gradient_checkpointing=False,
    )
    return run_loop(workload, model, steps, autocast=True)
