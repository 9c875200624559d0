"""Activations in the host's memory on a GPU: the same losses, less of the GPU's memory: `pytest -m gpu -s`."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_model
from commands import Result, environment

from posttrain.utils.gpus import visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(visible_gpus() < 1, reason="needs a GPU"),
]

STEPS = 12
LOSSES = 1e-3  # of two equal runs in bf16, whose sums have no fixed order
LAYERS = 8
KINDS = ("Llama", "Gemma2", "Qwen3Moe")
WAYS = {
    "here": [],
    "captured": ["trainer.offload_layers=6"],
    "eager": ["trainer.offload_layers=6", "trainer.cuda_graph=false"],
    "all, again": [f"trainer.offload_layers={LAYERS}", "trainer.recompute=full"],
}


def write_model(directory: Path, kind: str) -> None:
    """A random model with the small tokenizer and data."""
    import torch
    import transformers

    tiny_model.write(directory)
    with (directory / "text.jsonl").open("w") as file:
        for i in range(300):
            file.write(json.dumps({"text": f"{i:03d}-" * (100 + i % 120) + "xyz"}) + "\n")
    config = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 288,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    if kind == "Qwen3Moe":
        config |= {"num_experts": 8, "moe_intermediate_size": 256, "norm_topk_prob": True, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], Result]:
    """Each kind trained in each way."""
    directory = tmp_path_factory.mktemp("offload")
    for kind in KINDS:
        write_model(directory / kind, kind)

    def train(case: tuple[str, str]) -> Result:
        kind, way = case
        model, run_dir = directory / kind, directory / f"{kind} {way}".replace(" ", "_").replace(",", "")
        words = [
            "model=hf", f"model.path={model}", "objective=text", f"data.path={model / 'text.jsonl'}",
            "data.validation_fraction=0.1", "trainer.seq_length=1024", "trainer.global_batch_size=4",
            "trainer.micro_batch_size=2", f"trainer.max_steps={STEPS}", "trainer.num_generations=0",
            "optimizer.lr=1e-4", "scheduler=constant", "scheduler.lr_warmup_fraction=0", "checkpoint.save=false",
            "peft=lora", f"hydra.run.dir={run_dir}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "posttrain", *words, *WAYS[way]]
        first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        env = environment(directory / "cache") | {"CUDA_VISIBLE_DEVICES": first}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=directory, timeout=600)
        return Result(done.returncode, done.stdout, done.stderr, run_dir)

    cases = [(kind, way) for kind in KINDS for way in WAYS]
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(cases, pool.map(train, cases), strict=True))


def peak(result: Result) -> float:
    return json.loads((result.run_dir / "summary.json").read_text())["peak_memory_gib"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_same_losses_in_less_memory(kind, way, results):
    result, here = results[kind, way], results[kind, "here"]
    for each in (result, here):
        assert each.code == 0, each.err + each.log()[-3000:]
    off = max(abs(a - b) / abs(b) for a, b in zip(result.losses, here.losses, strict=True))
    print(f"{kind}, {way}: {off:.1e}, {peak(result):.3f} GiB of {peak(here):.3f}")
    assert len(result.losses) == STEPS and result.losses[-1] < result.losses[0]
    assert off < LOSSES
    assert way == "here" or peak(result) < peak(here)
