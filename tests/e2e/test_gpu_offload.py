"""Activations in the host's memory on a GPU: the same losses, less of the GPU's memory: `pytest -m gpu -s`."""

import itertools
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

STEPS = 8
LOSSES = 2e-4  # two equal runs differ by a quarter of it
LENGTH = 4096
LAYERS = 8
KINDS = ("Llama", "Gemma2")
ADDED = ["trainer.offload_layers=6", f"trainer.offload_layers={LAYERS}"]
WAYS = {  # each without and with activations in the host's memory
    "captured": ([], ADDED[0]),
    "plain": (["trainer.cuda_graph=false"], ADDED[0]),
    "computed again": (["trainer.recompute=full"], ADDED[1]),
}


def write_model(directory: Path, kind: str) -> None:
    """A random model with the small tokenizer, and a long text."""
    import torch
    import transformers

    tiny_model.write(directory)
    rows = [json.dumps({"text": f"{i:03d}-" * 1000 + "xyz"}) for i in range(40)]
    (directory / "text.jsonl").write_text("\n".join(rows))
    config = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 288,
        "max_position_embeddings": LENGTH,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str, bool], Result]:
    """Each kind trained in each way, without and with."""
    directory = tmp_path_factory.mktemp("offload")
    for kind in KINDS:
        write_model(directory / kind, kind)

    def train(case: tuple[str, str, bool]) -> Result:
        kind, way, offloaded = case
        model, run_dir = directory / kind, directory / f"{kind} {way} {offloaded}".replace(" ", "_")
        words = [
            "model=hf", f"model.path={model}", "objective=text", f"data.path={model / 'text.jsonl'}",
            "data.validation_fraction=0.1", f"trainer.seq_length={LENGTH}", "trainer.global_batch_size=4",
            "trainer.micro_batch_size=2", f"trainer.max_steps={STEPS}", "trainer.num_generations=0",
            "optimizer.lr=1e-4", "scheduler=constant", "scheduler.lr_warmup_fraction=0", "checkpoint.save=false",
            "trainer.export=false", "peft=lora", f"hydra.run.dir={run_dir}",
        ]  # fmt: skip
        overrides, added = WAYS[way]
        words += [*overrides, added] if offloaded else overrides
        first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        env = environment(directory / "cache") | {"CUDA_VISIBLE_DEVICES": first}
        command = [sys.executable, "-m", "posttrain", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=directory, timeout=600)
        return Result(done.returncode, done.stdout, done.stderr, run_dir)

    cases = list(itertools.product(KINDS, WAYS, (False, True)))
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(cases, pool.map(train, cases), strict=True))


def summary(result: Result) -> dict:
    return json.loads((result.run_dir / "summary.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_same_losses_in_less_memory(kind, way, results):
    """As much less of the GPU's memory as planned."""
    before, after = results[kind, way, False], results[kind, way, True]
    for each in (before, after):
        assert each.code == 0, each.err + each.log()[-3000:]
    off = max(abs(a - b) / abs(b) for a, b in zip(after.losses, before.losses, strict=True))
    peaks = [summary(each)["peak_memory_gib"] for each in (before, after)]
    planned = [summary(each)["memory_planned_gib"] for each in (before, after)]
    print(
        f"{kind}, {way}: {off:.1e}, {peaks[0]:.3f} to {peaks[1]:.3f} GiB, planned {planned[0]:.3f} to {planned[1]:.3f}"
    )
    assert len(after.losses) == STEPS and after.losses[-1] < after.losses[0]
    assert off < LOSSES
    assert planned[0] - planned[1] == pytest.approx(peaks[0] - peaks[1], rel=0.1, abs=0.05)
    assert planned[1] < planned[0]
