"""A plain training loop over a Hugging Face model, and how any peer's steps are timed."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from posttrain.bench.workloads import SHAPES, Workload


def wait_for_turn() -> None:
    """Tell that all is imported, and wait for a line."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit(0)


def measure(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Time `step`, waiting for the device after each."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def run_loop(workload: Workload, model: PreTrainedModel, steps: int, autocast: bool = False) -> dict[str, Any]:
    """A plain loop over a Hugging Face model."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    vocab_size = SHAPES[workload.shape]["vocab_size"]

    def step() -> None:
        for _ in range(workload.accumulation):
            ids = torch.randint(0, vocab_size, (workload.micro, workload.length), device="cuda")
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss / workload.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(step, steps)


def random_model(workload: Workload) -> PreTrainedModel:
    """Return a transformers model with random bf16 weights on the GPU."""
    fields = dict(SHAPES[workload.shape])
    del fields["model_type"]
    config = LlamaConfig(**fields, attn_implementation="sdpa")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
