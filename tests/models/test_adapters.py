"""LoRA on every family: the exported adapter and the merged model are, to PEFT and transformers, the model here."""

import pytest
from families import FAMILIES, save_random
from parity import adapter_logits, merged_logits, peft_logits, unpacked_logits

TOLERANCE = 1e-4
# Hugging Face's own names of a family's projections; the default is Llama's.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NAMES = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h"],
    "gpt_neox_sequential": ["query_key_value", "dense_4h_to_h"],
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
}


@pytest.mark.parametrize("kind", ["megatron_names", "hf_names"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_exported_and_merged(family, kind, megatron, tmp_path):
    base = save_random(family, tmp_path / "base")
    names = "all-linear" if kind == "megatron_names" else NAMES.get(family, [*ATTENTION, "gate_proj", "up_proj"])
    found = adapter_logits(tmp_path / "base", tmp_path / "adapter", names)
    assert (found - unpacked_logits(base)).abs().max() > 0.3  # the adapter does something
    assert (found - peft_logits(tmp_path / "base", tmp_path / "adapter")).abs().max() < TOLERANCE
    assert (found - merged_logits(tmp_path / "adapter")).abs().max() < TOLERANCE
