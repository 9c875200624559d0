"""Layers as wide as real models' on a GPU, rows of three sequences: as near to fp32 as transformers in bf16 is.

Kernels are chosen by sizes: what holds for the tiny models of the other files need not hold here.
"""

import parity
import pytest
import torch
from test_gpu import compare_step

pytestmark = pytest.mark.gpu
LENGTHS = (700, 1, 323)
SCALE = 100  # divides the factor 10 of save_random: at these widths transformers' own random weights are good
LONG = {"max_position_embeddings": 2048, "num_hidden_layers": 1}
MODELS = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": 256,
    },
    "gemma": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "qwen2": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gpt_neox": {"hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64},
    "gemma2": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 256,
        "num_hidden_layers": 2,
    },
}


@pytest.mark.parametrize("family", MODELS)
def test_step_of_wide_layers(family, gpu, tmp_path, record_property, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    total = sum(LENGTHS)
    monkeypatch.setattr(parity, "LENGTHS", LENGTHS)
    monkeypatch.setattr(parity, "TOKENS", torch.randint(3, 96, (1, total), generator=generator))
    monkeypatch.setattr(parity, "LABELS", torch.randint(3, 96, (1, total), generator=generator))
    monkeypatch.setattr(parity, "MASK", torch.rand(1, total, generator=generator) < 0.6)
    compare_step(family, LONG | MODELS[family], tmp_path, record_property, SCALE)
