"""Planned against measured tok/s: one H200, LoRA rank 16 on all linear layers, full rows of 4,096 tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from posttrain.config.composition import compose
from posttrain.plan.speed import estimate_speed
from posttrain.spec.run_spec import resolve_spec
from posttrain.utils import gpus

ROWS = yaml.safe_load((Path(__file__).resolve().parents[2] / "bench" / "scaling.yaml").read_text())
FULL = ["objective=text", "data.path=x", "objective.document_boundaries=false", "trainer.seq_length=4096",
        "trainer.micro_batch_size=1"]  # fmt: skip
MEASURED = {  # per GPU: bench/README.md, docs/scaling.md
    "1b": 71_964,
    "8b": 15_542,
    "8b_fp8": 20_469,
    "8b_pp2": 13_127,
    "8b_tp2": 12_604,
    "70b_fp8": 3_265,
    "gemma2_2b": 30_575,
    "gemma2_9b": 10_105,
    "gemma2_9b_fp8": 12_480,
    "gemma_7b": 13_958,
    "qwen3_8b": 15_227,
    "qwen3_8b_fp8": 19_106,
    "pythia_6b9": 17_492,
    "qwen3_30b_a3b": 21_386,
    "mixtral_8x7b_fp8": 11_432,
}


@pytest.mark.parametrize("row", MEASURED)
def test_within_a_tenth(row):
    world = ROWS[row].get("gpus", 1)
    spec = replace(resolve_spec(compose([*FULL, *ROWS[row]["overrides"]]), world), supervised_share=1.0)
    tokens = spec.global_batch * spec.length
    planned = estimate_speed(spec, gpus.find_gpu("h200"), tokens).tokens_per_second
    assert planned / world == pytest.approx(MEASURED[row], rel=0.1)
