"""The example of a new model family in docs/: as transformers has it, in logits, gradients and every exported bit."""

import sys
from pathlib import Path

import pytest
from families import FAMILIES, LLAMA
from parity import adapter_logits, build, differences, peft_logits, read_reference, train_step, write_reference
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
STARCODER = {**LLAMA, "sliding_window": 5, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}


@pytest.fixture
def starcoder(megatron, tmp_path, monkeypatch):
    """A tiny random StarCoder2 with its reference; the example's bridge is registered."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(FAMILIES, "starcoder2", ("starcoder2", STARCODER))
    import starcoder2_bridge  # noqa: F401

    write_reference("starcoder2", tmp_path)
    return tmp_path


def test_a_step_and_the_export(starcoder):
    errors = differences(train_step(starcoder), read_reference(starcoder))
    assert max(errors.values()) < 1e-4, errors
    bridge, parts, _ = build(starcoder)
    source, exported = load_file(starcoder / "model.safetensors"), dict(bridge.export_hf_weights(parts, cpu=True))
    assert exported.keys() == source.keys() and all(exported[name].equal(source[name]) for name in source)


def test_an_adapter_is_what_peft_makes_of_it(starcoder):
    found = adapter_logits(starcoder, starcoder / "adapter", ["linear_qkv", "linear_fc1"])
    assert (found - peft_logits(starcoder, starcoder / "adapter")).abs().max() < 1e-4


def test_the_model_of_the_config_group_uses_it(starcoder):
    sys.modules.pop("starcoder2", None)
    from starcoder2 import Starcoder2

    assert type(Starcoder2(path=str(starcoder)).bridge()._model_bridge).__name__ == "Starcoder2Bridge"
