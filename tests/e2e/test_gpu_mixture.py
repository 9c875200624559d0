"""Mixtures on one GPU: grouped products, captured or not, train as upstream's experts do: `pytest -m gpu -s`."""

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

STEPS = 20
LOSSES = 1e-3  # in bf16, whose rounding depends on the order of sums
EIGHT_BIT = 2e-2
KINDS = ("Mixtral", "Qwen3Moe")
WAYS = {
    "captured": [],
    "eager": ["trainer.cuda_graph=false"],
    "upstream": ["+trainer.megatron.model.moe_permute_fusion=true"],  # any change of the mixture's settings
    "recomputed": ["trainer.recompute=full"],
    "8 bits": ["precision=fp8"],
}


def write_model(directory: Path, kind: str) -> None:
    """A random mixture with the small tokenizer and data."""
    import torch
    import transformers

    tiny_model.write(directory)
    with (directory / "text.jsonl").open("w") as file:
        for i in range(400):
            file.write(json.dumps({"text": f"{i:03d}-" * (1 + i % 12) + "xyz"}) + "\n")
    config = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 288,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
    }
    if kind == "Mixtral":
        config |= {"num_local_experts": 4, "sliding_window": None}
    else:
        config |= {"num_experts": 16, "moe_intermediate_size": 128, "norm_topk_prob": True}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], Result]:
    """Each kind trained in each way."""
    directory = tmp_path_factory.mktemp("mixtures")
    for kind in KINDS:
        write_model(directory / kind, kind)

    def train(case: tuple[str, str]) -> Result:
        kind, way = case
        model, run_dir = directory / kind, directory / f"{kind} {way}".replace(" ", "_")
        words = [
            "model=hf", f"model.path={model}", "objective=text", f"data.path={model / 'text.jsonl'}",
            "data.validation_fraction=0.1", "trainer.seq_length=256", "trainer.global_batch_size=8",
            f"trainer.max_steps={STEPS}", "trainer.num_generations=0", "optimizer.lr=1e-4", "scheduler=constant",
            "scheduler.lr_warmup_fraction=0", "checkpoint.save=false", "peft=lora", f"hydra.run.dir={run_dir}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "posttrain", *words, *WAYS[way]]
        first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        env = environment(directory / "cache") | {"CUDA_VISIBLE_DEVICES": first}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=directory, timeout=600)
        return Result(done.returncode, done.stdout, done.stderr, run_dir)

    cases = [(kind, way) for kind in KINDS for way in WAYS]
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(train, cases), strict=True))


def difference(one: Result, other: Result) -> float:
    """The largest relative one between losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_upstream(kind, way, results):
    """The export of each run has been compared with the live model by the run itself: Transformers and PEFT load it."""
    result, upstream = results[kind, way], results[kind, "upstream"]
    for each in (result, upstream):
        assert each.code == 0, each.err + each.log()[-3000:]
    off = difference(result, upstream)
    print(f"{kind}, {way}: {off:.1e}")
    assert len(result.losses) == STEPS and result.losses[-1] < result.losses[0]
    assert off < (EIGHT_BIT if way == "8 bits" else LOSSES)
    captured = "CUDA graph: on" in result.out + result.log()
    assert captured == (way not in ("eager", "upstream"))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_same_names_and_shapes(kind, results):
    from safetensors.torch import load_file

    (one,), (other,) = (results[kind, way].run_dir.glob("adapter/*.safetensors") for way in ("captured", "upstream"))
    found, exact = load_file(one), load_file(other)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in exact.items()
    }
