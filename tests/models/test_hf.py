"""Bad model directories are refused with the file, what is wrong with it, and what to do; good ones load."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.models.shapes import check_directory

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Shapes that one rule too many would refuse: every family's own names.
OTHERS = {
    "gpt2": {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"},
    "mixtral": {**LLAMA, "num_local_experts": 2},
    "gemma2": {**LLAMA, "head_dim": 8},
    "qwen3_moe": {**LLAMA, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
}


def make(directory, fields, **save):
    """Write a random model of the architecture `fields` to `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in fields.items() if key != "architectures"}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, **save)
    return directory


@pytest.fixture
def llama(tmp_path):
    return make(tmp_path / "llama", LLAMA)


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_passes(family, tmp_path):
    tensors = check_directory(make(tmp_path, {**OTHERS[family], "model_type": family}))
    assert {tensor.dtype for tensor in tensors.values()} == {"F32"}


def test_of_a_family_without_a_record_only_the_files_are_checked(llama, caplog):
    """Its layers may differ and its sizes mean something else; a damaged file is one all the same."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "num_hidden_layers": 61}))
    assert check_directory(llama)
    assert "model_type 'unheard_of' is not known here" in caplog.text
    (llama / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cut short"):
        check_directory(llama)


def test_config_of_a_directory_and_of_an_architecture(llama):
    model = HFModel(path=str(llama))
    assert model.is_local
    assert model.hf_config().hidden_size == 16
    assert HFModel(path="nobody/nothing", random_init=True, architecture=LLAMA).hf_config().vocab_size == 64


def test_pickles_are_refused(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        HFModel(path=str(llama)).hf_config()


def test_truncated_file(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: has \d+ bytes, its header says \d+"):
        check_directory(llama)


def test_damaged_header(llama):
    (llama / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"x" * 32)
    with pytest.raises(UserError, match="header is damaged"):
        check_directory(llama)


def test_empty_file(llama):
    (llama / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cut short"):
        check_directory(llama)


def test_missing_shard(tmp_path):
    make(tmp_path, LLAMA, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    check_directory(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: this shard is missing"):
        check_directory(tmp_path)


def test_tensor_that_the_index_promises(tmp_path):
    make(tmp_path, LLAMA, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != gone} | {"x": torch.zeros(1)}, shard)
    with pytest.raises(UserError, match=f"lists {gone}"):
        check_directory(tmp_path)


def test_missing_tensor_of_one_layer(llama):
    file = llama / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layer 0 has mlp.up_proj.weight, layer 1 has not"):
        check_directory(llama)


def test_lost_bias_that_is_called_like_a_buffer(tmp_path):
    """`attn.c_attn.bias` is a parameter, `attn.bias` GPT-2's causal mask."""
    make(tmp_path, {**OTHERS["gpt2"], "model_type": "gpt2"})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "transformer.h.0.attn.bias": torch.ones(4)}, file)
    check_directory(tmp_path)
    del tensors["transformer.h.1.attn.c_attn.bias"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layer 0 has attn.c_attn.bias, layer 1 has not"):
        check_directory(tmp_path)


def test_biases_that_config_does_not_know_are_not_lost(llama):
    file = llama / "model.safetensors"
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(16) for layer in range(2)}
    save_file({**load_file(file), **biases}, file)
    with pytest.raises(
        UserError, match=r"q_proj.bias would be lost: .*; set attention_bias to true in config.json, or"
    ):
        check_directory(llama)


def test_biases_that_config_promises_are_not_made_up(tmp_path):
    make(tmp_path, {**LLAMA, "model_type": "qwen2"})
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith("k_proj.bias")}, file)
    with pytest.raises(UserError, match=r"k_proj.bias is missing; the weights are incomplete"):
        check_directory(tmp_path)


def test_weights_in_eight_bits_are_refused(llama):
    """Without a quantization_config their scales would be ignored."""
    file = llama / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=r"is stored as F8_E4M3; give the model whose weights are not quantised"):
        check_directory(llama)


def test_a_field_that_is_there_twice(llama):
    file = llama / "config.json"
    file.write_text(file.read_text().rstrip().removesuffix("}") + ', "rms_norm_eps": 0.1}')
    with pytest.raises(UserError, match="the name 'rms_norm_eps' occurs twice"):
        check_directory(llama)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 65, r"(embed_tokens|lm_head).weight has shape \[64, 16\], but config.json says \[65, 16\]"),
        ("num_key_value_heads", 4, r"[kv]_proj.weight has shape \[8, 16\], but config.json says \[16, 16\]"),
        ("num_hidden_layers", 3, "the weights have 2 layers, config.json says 3"),
    ],
)
def test_config_that_contradicts_the_tensors(llama, field, value, message):
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        check_directory(llama)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "nowhere", "demo:other"])
def test_no_such_directory(path):
    with pytest.raises(UserError, match="no such directory"):
        HFModel(path=path).hf_config()


def test_unknown_architecture():
    with pytest.raises(UserError, match=r"transformers cannot read its configuration: [^\n]+$"):
        HFModel(path="x", random_init=True, architecture={"model_type": "nonesuch"}).hf_config()


def test_no_tokenizer(llama):
    with pytest.raises(UserError, match=r"model\.tokenizer: .* has no tokenizer\.json; [^\n]*$"):
        HFModel(path=str(llama)).load_tokenizer()


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{\n")
    with pytest.raises(UserError, match=r"^[^\n]*/tokenizer\.json: not valid JSON [^\n]*$"):
        HFModel(path=str(tmp_path)).load_tokenizer()


def test_what_transformers_says_of_a_config_stays_off_the_terminal(tmp_path):
    """Of these it warns: a tokenizer of another kind of model, a factor that is none."""
    rope = {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "rope_scaling": rope}))
    core = Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    program = (
        "from posttrain.config.composition import compose\n"
        "from posttrain.models.tokenizer import load_tokenizer\n"
        f"print(len(load_tokenizer(compose(['model=hf', 'model.path={tmp_path}']))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_an_adapter_whose_base_has_moved(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/none/there"}')
    with pytest.raises(UserError, match="its base model /none/there: no such directory; write its place"):
        _ = HFModel(path=str(tmp_path)).directory


def test_trusting_code_is_said_aloud(llama, caplog, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_TRUST_REMOTE_CODE", "1")
    HFModel(path=str(llama), trust_remote_code=True).hf_config()
    assert "runs with your rights" in caplog.text


def test_the_package_imports_nothing_heavy():
    code = "import sys, posttrain.models; print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def heads(tmp_path, tied: bool, head):
    """A Llama whose config.json says `tied`, and whose file holds `head`, a function of the embedding; None: none."""
    directory = make(tmp_path / "llama", {**LLAMA, "tie_word_embeddings": tied})
    weights = load_file(directory / "model.safetensors")
    weights.pop("lm_head.weight", None)
    if head is not None:
        weights["lm_head.weight"] = head(weights["model.embed_tokens.weight"])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_an_output_matrix_that_tying_would_lose_is_refused(tmp_path):
    """Named with both ways out; transformers itself doesn't tie such a model."""
    from transformers import AutoModelForCausalLM

    def last_bit_of_the_last_row(embedding):
        head = embedding.clone()
        head[-1, -1] *= 1.001
        return head

    directory = heads(tmp_path, True, last_bit_of_the_last_row)
    message = r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings"
    with pytest.raises(UserError, match=message):
        _ = HFModel(path=str(directory)).directory
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert not model.lm_head.weight.equal(model.model.embed_tokens.weight)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert HFModel(path=str(directory)).directory == directory


def test_a_copy_of_the_embedding_is_no_output_matrix(tmp_path):
    check_directory(heads(tmp_path, True, torch.clone))
    check_directory(heads(tmp_path, True, None))


def test_an_output_matrix_that_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no output matrix .lm_head.*set tie_word_embeddings to true"):
        check_directory(heads(tmp_path, False, None))
