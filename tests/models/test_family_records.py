"""What the record of each model family claims is what transformers builds."""

import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec

import pytest
from families import FAMILIES, save_random
from safetensors import safe_open

from posttrain.config.composition import CONF_DIR
from posttrain.models.families import (
    experts_of,
    families,
    family_of,
    family_with,
    learned_positions_of,
    softcap_of,
)
from posttrain.models.families.family import PARTS, ConfigFields, Flag, is_set
from posttrain.models.shapes import check_directory
from posttrain.models.vocabulary import is_embedding, is_output

RECORDS = {family.model_type: family for family in families()}
ROWS = {model_type: name for name, (model_type, _) in reversed(FAMILIES.items())}


def default_config(family):
    """The configuration of transformers with nothing said."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family.model_type)


def tiny_config(family, **more):
    """The configuration of the family's row in the table of tiny models."""
    from transformers import AutoConfig

    _, sizes = FAMILIES[ROWS[family.model_type]]
    return AutoConfig.for_model(family.model_type, **{**sizes, **more})


def empty_model(config):
    """A model without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", params=RECORDS)
def family(request):
    return RECORDS[request.param]


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """(fields of config.json, shapes of the tensors) of a tiny random model that transformers has written."""
    directory = tmp_path_factory.mktemp(family.model_type)
    model = save_random(ROWS[family.model_type], directory, tie_word_embeddings=False)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert check_directory(directory).keys() == shapes.keys()
    return model.config.to_dict(), shapes


def test_every_family_has_its_rows():
    assert set(ROWS) == set(RECORDS)
    described = [file.read_text() for file in (CONF_DIR / "model" / "family").glob("*.yaml")]
    assert {re.search(r"model_type: (\w+)", text)[1] for text in described} == set(RECORDS)


def test_architectures_are_classes_of_transformers(family):
    from transformers import AutoModelForCausalLM

    config = default_config(family)
    assert family.architectures == (AutoModelForCausalLM._model_mapping[type(config)].__name__,)
    for architecture in family.architectures:
        assert family_with(architecture) is family
        assert family_of({"architectures": [architecture]}) is family
    assert family_of(config.to_dict()) is family


def test_the_bridge_is_a_module(family):
    assert family.bridge is None or find_spec(family.bridge)


def test_fields_are_those_of_the_configuration(family):
    config = default_config(family)
    for field in fields(ConfigFields):
        for name in getattr(family.fields, field.name):
            assert hasattr(config, name) or name == "head_dim", name


def test_defaults_are_those_of_the_configuration(family):
    config = default_config(family).to_dict()
    assert config["tie_word_embeddings"] == family.tied
    assert (family.value("dropout", config) or 0.0) == family.dropout
    for option in [family.parallel_residual, *(matrix.bias for matrix in family.matrices)]:
        if isinstance(option, Flag):
            assert config[option.field] == option.default, option
    if family.gate:
        activation = config.get("hidden_activation") or config["hidden_act"]
        assert activation == family.gate


def test_sizes_are_those_of_the_configuration(family, saved):
    config, _ = saved
    hf = tiny_config(family)
    sizes = family.dimensions(config)
    assert (sizes.hidden, sizes.layers, sizes.heads) == (hf.hidden_size, hf.num_hidden_layers, hf.num_attention_heads)
    assert sizes.groups == getattr(hf, "num_key_value_heads", hf.num_attention_heads)
    assert sizes.experts == experts_of(config) == getattr(hf, "num_local_experts", 0)
    assert sizes.chosen == getattr(hf, "num_experts_per_tok", 0)
    assert softcap_of(config) == getattr(hf, "final_logit_softcapping", None)
    learned = any(type(module).__name__ == "Embedding" and name.endswith("wpe") for name, module in _modules(hf))
    assert learned_positions_of(config) == (hf.n_positions if learned else None)


def _modules(config):
    return empty_model(config).named_modules()


def test_matrices_are_those_of_the_model(family, saved):
    config, shapes = saved
    sizes = family.dimensions(config)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert {name: family.shape_of(name, sizes) for name in matrices} == matrices
    for matrix in family.matrices:
        found = [name for name in matrices if matrix.pattern.search(name)]
        of_dense_layers = experts_of(config) and matrix.name.startswith("mlp.") and matrix.component
        assert found or of_dense_layers, matrix
        assert {name.replace(".weight", ".bias") in shapes for name in found} <= {is_set(matrix.bias, config)}, matrix


def test_biases_that_the_configuration_asks_for(family):
    asked = {matrix.bias.field: True for matrix in family.matrices if isinstance(matrix.bias, Flag)}
    config = tiny_config(family, **asked)
    names = set(empty_model(config).state_dict())
    for matrix in family.matrices:
        weights = [name for name in names if matrix.pattern.search(name)]
        found = {name.replace(".weight", ".bias") in names for name in weights}
        assert found <= {is_set(matrix.bias, config.to_dict())}, matrix


def test_layers_are_linear_or_transposed(family):
    kinds = {
        type(module).__name__
        for name, module in _modules(tiny_config(family))
        for matrix in family.adapted
        if matrix.pattern.search(f"{name}.weight")
    }
    assert kinds == {"Conv1D" if family.transposed else "Linear"}


def test_layers_and_norms(family, saved):
    config, shapes = saved
    inside = [found[1] for name in shapes if (found := family.layer_of(name)) and found[0] == 0]
    outside = [name for name in shapes if family.layer_of(name) is None]
    assert inside and not any(re.search(r"\.\d+\.", name) for name in outside)
    of_queries_and_keys = re.compile(r"\.[qk]_norm\.weight$")
    vectors = [
        name for name in inside if name.endswith(".weight") and family.shape_of(name, family.dimensions(config)) is None
    ]
    norms = [name for name in vectors if not of_queries_and_keys.search(name)]
    assert len(norms) == family.norms
    assert (len(vectors) > len(norms)) == family.qk_norm
    assert {name.replace(".weight", ".bias") in inside for name in norms} == {family.norm_bias}


def test_embedding_and_output_layer(family, saved):
    _, shapes = saved
    model = empty_model(tiny_config(family, tie_word_embeddings=False))
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embedding, output = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    assert embedding.endswith(f".{family.embedding}") and output == family.output_layer
    assert [name for name in shapes if is_embedding(name)] == [embedding]
    assert [name for name in shapes if is_output(name)] == [output]


def test_components_are_of_four_matrices(family):
    components = {matrix.component for matrix in family.matrices if matrix.component}
    assert {PARTS.get(name, name) for name in components} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert ("linear_fc1_gate" in components) == (family.gate is not None)


def test_of_an_unknown_family_only_what_any_would_call_so():
    config = {"model_type": "unheard_of", "num_local_experts": 4, "n_positions": 8, "architectures": 5}
    assert family_of(config) is None and family_of({"architectures": 5}) is None
    assert experts_of(config) == 4
    assert softcap_of(config) is None and learned_positions_of(config) is None


def test_records_are_read_before_anything_heavy():
    heavy = "import sys, posttrain.models.families; print({'torch', 'megatron', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout == "set()\n"
