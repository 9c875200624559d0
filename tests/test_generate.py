"""Asking a model: what counts as one, and what comes back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.generate import exported, parser

sys.path.insert(0, str(Path(__file__).parent / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama with a tokenizer."""
    import torch
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=288, **sizes)).save_pretrained(directory)
    return directory


def test_what_is_a_model(tmp_path, model):
    assert exported(model) == model
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match="no finished export"):
        exported(run)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert exported(run) == run / "adapter"
    with pytest.raises(UserError, match="no such directory"):
        exported(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run directory"):
        exported(tmp_path / "empty")


def test_prompts_may_follow_options():
    settings = parser().parse_intermixed_args(["DIR", "--system", "s", "one", "two"])
    assert settings.prompts == ["one", "two"]


def test_answers_from_the_command_line(model):
    command = [sys.executable, "-m", "posttrain.generate", str(model), "--max-new-tokens", "4", "--json", "hello", "la"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["hello", "la"]


def test_a_missing_model_is_one_line(tmp_path):
    command = [sys.executable, "-m", "posttrain.generate", str(tmp_path / "nothing"), "hello"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no such directory" in done.stderr and "Traceback" not in done.stderr
