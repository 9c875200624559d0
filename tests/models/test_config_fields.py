"""Every field of config.json is honoured, so that logits are transformers' own, or refused in one line."""

import json

import pytest
import torch
from config_variants import BASE, HONOURED, LEFT_OUT, LONG, REFUSED, SHORT, rope
from random_model import write_model

from posttrain.convert.artifacts import write_config
from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.config_checks import check_config, check_length
from posttrain.models.families import families, position_limit_of

RECORDS = {family.model_type: family for family in families()}
LENGTHS = (3, 64, 200)
TOLERANCE = 2e-5  # largest difference over the largest logit; right models are at 2e-6 or below
CASES = [(model_type, name) for model_type, variants in HONOURED.items() for name in variants]
LEFT_OUT_CASES = [(model_type, name) for model_type, names in LEFT_OUT.items() for name in names]
# One of each kind that has code of its own; the rest is the same code with other numbers.
QUICK = {
    ("llama", "yarn"),
    ("llama", "attention_bias"),
    ("llama", "mlp_bias"),
    ("llama", "llama3_narrow"),
    ("mistral", "yarn_factor"),
    ("mixtral", "linear"),
    ("qwen2", "window"),
    ("qwen2", "longrope"),
    ("qwen3", "layer_types"),
    ("qwen3_moe", "window"),
    ("qwen3_moe", "attention_bias"),
    ("gemma", "gelu"),
    ("gemma", "untied"),
    ("gemma2", "layer_types"),
    ("gemma2", "yarn"),
    ("gpt2", "untied"),
    ("gpt_neox", "linear"),
    ("qwen3", "head_dim"),
    ("mixtral", "num_local_experts"),
}


def marked(case):
    """A parameter of a test, for every night unless it is one of QUICK."""
    marks = [] if case in QUICK else [pytest.mark.nightly]
    return pytest.param(*case, marks=marks, id="-".join(case))


def write_fields(model_type, fields, directory):
    """Write a random model with these fields; return it."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return write_model(model_type, {**BASE[model_type], **tokens, **fields}, directory, 10.0)


@torch.no_grad()
def megatron_logits(model):
    """Logits [1, t, vocabulary] of the imported model, by the number of tokens t."""
    from posttrain.models.local_spec import use_local_layers

    provider = model.bridge().to_megatron_provider()
    use_local_layers(provider)
    provider.use_cpu_initialization = True
    provider.finalize()
    (part,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    part.eval()
    return {length: part(tokens(length), torch.arange(length)[None], None) for length in LENGTHS}


def tokens(length):
    """Ids [1, length]."""
    return torch.randint(3, 517, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("model_type", "name"), [marked(case) for case in CASES])
def test_a_field_is_honoured(model_type, name, megatron, tmp_path):
    from transformers import AutoConfig

    fields = HONOURED[model_type][name]
    hf = write_fields(model_type, fields, tmp_path / "model")
    model = HFModel(path=str(tmp_path / "model"))
    for length, found in megatron_logits(model).items():
        with torch.no_grad():
            expected = hf(tokens(length)).logits
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference < TOLERANCE, (length, float(difference))
    (tmp_path / "out").mkdir()
    write_config(tmp_path / "out", model.hf_config(), model.directory, "float32")
    back = AutoConfig.from_pretrained(tmp_path / "out")
    written, before = back.to_dict(), hf.config.to_dict()
    assert {key for key in before if before[key] != written.get(key)} <= {"_name_or_path"}
    check_config(json.loads((tmp_path / "out" / "config.json").read_text()), "")


@pytest.mark.parametrize(("model_type", "name"), [marked(case) for case in LEFT_OUT_CASES])
def test_a_field_that_is_left_out_has_the_value_of_transformers(model_type, name, megatron, tmp_path):
    from transformers import AutoConfig

    usual = getattr(AutoConfig.for_model(model_type), name)
    hf = write_fields(model_type, {**LEFT_OUT[model_type][name], name: usual}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for length, found in megatron_logits(HFModel(path=str(tmp_path))).items():
        with torch.no_grad():
            expected = hf(tokens(length)).logits
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference < TOLERANCE, (length, float(difference))


@pytest.mark.parametrize("model_type", BASE)
def test_defaults_are_those_of_transformers(model_type):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    defaults = RECORDS[model_type].defaults
    assert dict(defaults) == {name: getattr(config, name) for name in defaults}


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda name: None if name == "model.norm.weight" else name, id="lost"),
        pytest.param(lambda name: name.removeprefix("model."), id="other names"),
    ],
)
def test_a_weight_that_is_missing_is_not_drawn(rename, megatron, tmp_path):
    from safetensors.torch import load_file, save_file

    write_fields("llama", {}, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights have no model.norm.weight \(\d+ tensors are missing, and would"):
        megatron_logits(HFModel(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("model_type", "name"), [(model_type, name) for model_type, variants in REFUSED.items() for name in variants]
)
def test_a_field_is_refused(model_type, name):
    fields, message = REFUSED[model_type][name]
    config = {"model_type": model_type, **BASE[model_type], **fields}
    with pytest.raises(UserError, match=message) as refused:
        check_config(config, "config.json: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model_type", BASE)
def test_classes_and_the_type_agree(model_type):
    """transformers goes by the type, Megatron-Bridge by the classes."""
    (own,) = RECORDS[model_type].architectures
    config = {"model_type": model_type, **BASE[model_type], "architectures": [own]}
    check_config(config, "")
    for other, family in RECORDS.items():
        if other != model_type:
            with pytest.raises(UserError, match=f"architectures={family.architectures[0]}: is a class of .* {other};"):
                check_config({**config, "architectures": ["Unknown", family.architectures[0]]}, "")


@pytest.mark.parametrize("model_type", BASE)
def test_every_field_of_transformers_has_a_rule(model_type):
    """A field that a coming version adds is seen here before a model has it."""
    from transformers import AutoConfig

    family = RECORDS[model_type]
    usual = AutoConfig.for_model(model_type).to_dict()
    assert usual.keys() <= family.rules.keys()
    assert family.problem(usual) is None
    assert family.problem({"model_type": model_type, **BASE[model_type]}) is None


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        (rope("linear", factor=4.0), None),
        (rope("dynamic", factor=4.0), 512),
        (rope("longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=64), 64),
        (rope("longrope", short_factor=SHORT, long_factor=LONG), 512),
        (rope("longrope", short_factor=SHORT, long_factor=SHORT), None),
    ],
)
def test_frequencies_that_change_with_the_length_limit_it(fields, limit):
    """Beyond, transformers takes others for a longer sequence, and packed ones of both lengths are trained together."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {"model_type": "llama", **BASE["llama"], **fields}
    assert position_limit_of(config) == limit
    if limit is None:
        check_length(config, 10**6)
    else:
        check_length(config, limit)
        with pytest.raises(UserError, match=rf"`trainer.seq_length={limit + 1}`: .* up to {limit} tokens only"):
            check_length(config, limit + 1)
    rotary = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.rotary_emb
    before = rotary.inv_freq
    for length, same in ((limit or 600, True), ((limit or 600) + 1, limit is None)):
        rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(rotary.inv_freq, before) == same


def test_every_family_has_its_variants():
    assert set(BASE) == set(HONOURED) == set(REFUSED) == set(RECORDS)


def test_accepted_activations_are_those_that_there_are(megatron):
    from transformers.activations import ACT2FN

    from posttrain.models.bridges.activation_functions import ACTIVATIONS
    from posttrain.models.families.field_rules import ACTIVATION

    assert [name for name in ACT2FN if ACTIVATION.accepts(name)] == [name for name in ACT2FN if name in ACTIVATIONS]
    x = torch.linspace(-4, 4, 101)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x), atol=2e-6, rtol=1e-5)
