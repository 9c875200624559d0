"""The example of a new model family in docs/: as transformers has it, in logits, gradients and every exported bit."""

import sys
from pathlib import Path

import pytest
from families import FAMILIES, LLAMA
from parity import adapter_logits, build, differences, peft_logits, read_reference, train_step, write_reference
from safetensors.torch import load_file

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.models import families
from posttrain.models.shapes import check_directory
from posttrain.peft.adapters import resolve
from posttrain.spec import checks
from posttrain.spec.resolve import resolve_spec

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
STARCODER = {**LLAMA, "sliding_window": 5, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}


@pytest.fixture
def example(monkeypatch):
    """The examples are on the path and allowed; what they register is forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "starcoder2")
    monkeypatch.setattr(families, "_known", dict(families._known))
    monkeypatch.delitem(sys.modules, "starcoder2", raising=False)


@pytest.fixture
def starcoder(example, megatron, tmp_path, monkeypatch):
    """A tiny random StarCoder2 with its reference; the example's family is registered."""
    monkeypatch.setitem(FAMILIES, "starcoder2", ("starcoder2", STARCODER))
    import starcoder2  # noqa: F401

    write_reference("starcoder2", tmp_path)
    return tmp_path


def test_a_step_and_the_export(starcoder):
    errors = differences(train_step(starcoder), read_reference(starcoder))
    assert max(errors.values()) < 1e-4, errors
    bridge, parts, _ = build(starcoder)
    source, exported = load_file(starcoder / "model.safetensors"), dict(bridge.export_hf_weights(parts, cpu=True))
    assert exported.keys() == source.keys() and all(exported[name].equal(source[name]) for name in source)
    assert check_directory(starcoder).keys() == source.keys()


def test_an_adapter_is_what_peft_makes_of_it(starcoder):
    found = adapter_logits(starcoder, starcoder / "adapter", ["linear_qkv", "linear_fc1"])
    assert (found - peft_logits(starcoder, starcoder / "adapter")).abs().max() < 1e-4


def test_the_model_of_the_config_group_uses_its_bridge(starcoder):
    from starcoder2 import Starcoder2

    assert type(Starcoder2(path=str(starcoder)).bridge()._model_bridge).__name__ == "Starcoder2Bridge"


def composed(*words):
    """A run of the example's model with more words."""
    return compose([f"hydra.searchpath=[file://{EXAMPLES}/conf]", "model=starcoder2_3b", *words])


def test_the_plan_counts_its_parameters(example):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.hf import plain

    cfg = composed("peft.target_modules=[q_proj,k_proj]")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain(cfg.model.architecture)))
    setting = resolve_spec(cfg, 1)
    assert setting.shape.parameters == model.num_parameters() == pytest.approx(3.03e9, rel=1e-3)
    assert setting.adapters.parameters == 30 * 16 * (3072 + 3072 + 3072 + 256)
    assert not setting.cuda_graph


def test_checks_know_it_from_its_record(example, capsys):
    with pytest.raises(UserError, match=r"tensor_model_parallel_size=4`: the model's 2 key-value groups"):
        checks.check(composed("parallelism.tensor_model_parallel_size=4", "trainer.seq_length=512"), 0)
    assert resolve(["c_fc"]) == (False, ["linear_fc1"])
    assert "is not known here" not in capsys.readouterr().err


def test_checks_step_aside_for_a_family_without_a_record(capsys):
    architecture = "{model_type: deepseek_v3, num_attention_heads: 3, num_hidden_layers: 3, n_positions: 8}"
    words = ["model=hf", "model.path=some/where", f"model.architecture={architecture}"]
    checks.check(compose([*words, "parallelism.tensor_model_parallel_size=2", "trainer.seq_length=64"]), 0)
    assert "model_type 'deepseek_v3' is not known here, so only Megatron can tell" in capsys.readouterr().err
    checks.check(compose([*words, "trainer.seq_length=64"]), 0)
    assert capsys.readouterr().err == ""
