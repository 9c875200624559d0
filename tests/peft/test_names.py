"""Users' names of modules to Megatron-Bridge's."""

import pytest

from posttrain.errors import UserError
from posttrain.peft import DoRA, LoRA
from posttrain.peft.adapters import FUSED, resolve


@pytest.mark.parametrize(
    "names, expected",
    [
        ("all-linear", (False, list(FUSED))),
        (["linear_qkv"], (False, ["linear_qkv"])),
        (["q_proj", "v_proj"], (True, ["linear_q", "linear_v"])),
        (["o_proj", "gate_proj"], (True, ["linear_proj", "linear_fc1_gate"])),
        (["linear_proj", "q_proj"], (True, ["linear_proj", "linear_q"])),
        (["*.layers.0.*.q_proj"], (True, ["*.layers.0.*.linear_q"])),
        (["query_key_value", "dense_4h_to_h"], (False, ["linear_qkv", "linear_fc2"])),
        ("linear_fc2", (False, ["linear_fc2"])),
    ],
)
def test_resolved(names, expected):
    assert resolve(names) == expected


@pytest.mark.parametrize(
    "names, expected",
    [
        ([], "names no module"),
        (["q_porj"], "unknown module 'q_porj'"),
        (["linear_qkv", "q_proj"], "whole matrix"),
    ],
)
def test_refused(names, expected):
    with pytest.raises(UserError, match=expected):
        resolve(names)


def test_scale():
    assert LoRA(rank=8).effective_alpha == 16
    assert LoRA(rank=8, alpha=4).effective_alpha == 4
    assert LoRA(rank=16, alpha=4, rslora=True).effective_alpha / 16 == pytest.approx(4 / 4)


def test_dora_refuses_parts():
    with pytest.raises(UserError, match="whole matrices"):
        DoRA(target_modules=["q_proj"]).build()


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (LoRA(), True),
        (LoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]), True),
        (LoRA(target_modules=["linear_qkv"]), False),
        (LoRA(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]), False),
        (LoRA(dropout=0.1), False),
        (LoRA(fused=False), False),
        (DoRA(), False),
    ],
)
def test_every_layer_fused(adapter, expected):
    assert adapter.every_layer_fused is expected
