"""A tiny random model with a tokenizer, files of questions, and the command in this process."""

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "models"), str(TESTS / "data")]  # families, the small tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama of 2 layers with random weights and a byte tokenizer."""
    import torch
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """a.jsonl: 12 rows of two categories, one without; b.jsonl: 5 rows and a broken one."""
    directory = tmp_path_factory.mktemp("questions")
    kinds = ["sum", "word", None]
    rows = [
        {"prompt": f"what is {i}" + " please" * (i % 4), "completion": f"it is {i}", "category": kinds[i % 3]}
        for i in range(12)
    ]
    (directory / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"say {i}", "completion": f"so {i}"} for i in range(5)] + [{"prompt": "no answer"}]
    (directory / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Run the command; returns result.json, with the answers under `lines`."""
    from posttrain.evaluate.__main__ import main

    def run(what, *words):
        out = tmp_path / "out"
        words = [*words, f"evaluate.out={out}", f"cache_dir={tmp_path / 'cache'}"]
        monkeypatch.setattr(sys, "argv", ["evaluate", str(what), *words])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        main()
        result = json.loads((out / "result.json").read_text())
        answers = out / "answers.jsonl"
        result["lines"] = [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []
        return result

    return run
