"""Sizes from config.json, for the models of conf/ and for mistakes."""

import pytest

from posttrain.config.composition import CONF_DIR, compose
from posttrain.errors import UserError
from posttrain.spec.model_checks import architecture
from posttrain.spec.resolve import resolve_spec
from posttrain.spec.shape import Adapters, Shape, config_of

# One of each family; published ones are compared with transformers' in tests/models/test_model_configs.py.
ONE_EACH = [
    "llama1_7b", "llama2_7b", "llama3_8b", "llama31_8b_instruct", "llama32_1b", "mistral_7b_v03", "mixtral_8x7b",
    "gemma_2b", "gemma2_2b", "qwen25_0b5", "qwen3_0b6", "qwen3_30b_a3b", "gpt2", "pythia_160m", "smollm2_135m",
]  # fmt: skip


@pytest.mark.parametrize("name", ONE_EACH)
def test_parameters_are_those_of_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.hf import plain

    fields = plain(compose([f"model={name}"]).model.architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert Shape.from_config(fields).parameters == model.num_parameters()


def test_every_model_of_conf_is_known():
    import posttrain.convert.__main__  # noqa: F401  (convert.yaml has the model and little else: composed sooner)

    for name in sorted(file.stem for file in (CONF_DIR / "model").glob("*.yaml") if file.stem != "hf"):
        model = compose([f"model={name}"], config_name="convert").model
        assert Shape.from_config(model.architecture).parameters > 7e7, name


def test_directory_comes_before_the_configured_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, '
                                          '"vocab_size": 11, "n_positions": 5}')  # fmt: skip
    from posttrain.models import HFModel

    architecture = {"model_type": "llama"}
    assert config_of(HFModel(str(tmp_path), architecture=architecture))["n_embd"] == 8
    assert config_of(HFModel(str(tmp_path), architecture=architecture, random_init=True)) == architecture


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' are not known"),
        ({}, "model_type None are not known"),
        ({"model_type": "llama", "hidden_size": 8}, "lacks a size"),
    ],
)
def test_unknown_shapes(config, expected):
    with pytest.raises(UserError, match=expected):
        Shape.from_config(config)


def test_unknown_layers():
    shape = resolve_spec(compose(["model=llama32_1b"]), 1).shape
    with pytest.raises(UserError, match="unknown module 'q_prod'"):
        Adapters.from_targets(shape, "LoRA", 8, ["q_prod"], True)
    with pytest.raises(UserError, match="no layer of this model has such a name"):
        Adapters.from_targets(shape, "LoRA", 8, ["decoder.layers.99.self_attention.linear_qkv"], True)


def test_names_choose_layers():
    shape = resolve_spec(compose(["model=llama32_1b"]), 1).shape
    whole = Adapters.from_targets(shape, "LoRA", 16, "all-linear", True)
    assert whole.parameters == 16 * 16 * (2048 + 3072 + 2048 + 2048 + 2048 + 16384 + 8192 + 2048)
    parts = Adapters.from_targets(shape, "LoRA", 16, ["q_proj", "v_proj"], True)
    assert parts.canonical and parts.sizes == {"linear_qkv": (16, 16 * (2048 + 2048 + 2048 + 512))}
    one = Adapters.from_targets(shape, "LoRA", 16, ["*.layers.3.mlp.linear_fc1"], True)
    assert one.sizes == {"linear_fc1": (1, 16 * (2048 + 16384))}


@pytest.mark.parametrize(
    ("words", "silu", "kernel"),
    [
        (["model=llama3_8b"], True, True),
        (["model=llama3_8b", "model.architecture.hidden_act=swish"], True, True),
        (["model=llama3_8b", "model.architecture.hidden_act=gelu"], False, True),
        (["model=llama3_8b", "model.architecture.hidden_act=relu"], False, False),
        (["model=gemma2_2b"], False, True),
        (["model=gpt2"], False, True),
        (["model=pythia_160m"], False, True),
        (["model=gpt2", "model.architecture.activation_function=relu"], False, False),
    ],
)
def test_kernels_of_activations_are_counted_on_where_they_are(words, silu, kernel):
    shape = Shape.from_config(architecture(compose(words).model))
    assert (shape.silu_gate, shape.activation_kernel) == (silu, kernel)
