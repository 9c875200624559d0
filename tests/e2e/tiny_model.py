"""A model that trains in a second a step on any machine, with its tokenizer and data."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))  # the small tokenizer


ROWS = 291  # odd, so that Megatron fills the embedding up


def write(directory: Path, rows: int = ROWS) -> Path:
    """A Llama of 4 layers with random weights, its tokenizer, and data.jsonl of 60 short conversations.

    Args:
        directory: where to write it.
        rows: of the embedding; the tokenizer has 269 tokens.
    """
    import torch
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    with open(directory / "data.jsonl", "w") as file:
        for i in range(60):
            turns = [("user", f"say {i} " + "la " * (i % 5)), ("assistant", f"number {i}, hello world")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return directory
