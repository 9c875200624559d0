"""The benchmark's rows and table; the measurements themselves need a GPU."""

import json
import sys
from pathlib import Path

import pytest

from posttrain.bench.__main__ import print_table, write_full_length
from posttrain.bench.peers import PEERS
from posttrain.bench.workloads import MODELS, SHAPES, WORKLOADS, Workload

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the small tokenizer


def test_operations_of_a_step():
    row = Workload("x", "1b", 2, 3, ())
    layer = 2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192
    weights = 16 * layer + 2048 * 128256
    tokens = 2 * 3 * 4096
    assert row.tokens == tokens
    assert row.operations() == pytest.approx(4 * weights * tokens + 6 * 16 * 2048 * tokens * 4096)
    full = Workload("x", "1b", 2, 3, (), full=True)
    assert full.operations() - row.operations() == pytest.approx(2 * weights * tokens)


def test_rows_name_what_there_is():
    assert len({row.name for row in WORKLOADS}) == len(WORKLOADS)
    for row in WORKLOADS:
        assert row.shape in SHAPES.keys() & MODELS.keys()
        assert set(row.sides) <= {"posttrain", "posttrain-full-length", *PEERS}


def test_shapes_are_the_models():
    from posttrain.config.composition import compose

    for name, model in MODELS.items():
        architecture = compose([f"model={model}"]).model.architecture
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "vocab_size", "tie_word_embeddings"):  # fmt: skip
            assert architecture[key] == SHAPES[name][key], (name, key)


def test_full_length_conversations_fill_a_row(tmp_path):
    from tiny_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    write_full_length(tmp_path / "rows.jsonl", tmp_path, 512, 3)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer(row["answer"]).input_ids) for row in rows]
    assert len(rows) == 3 and all(350 < length <= 480 for length in lengths)


def test_table(capsys):
    print_table([
        {"row": "a", "side": "posttrain", "tok_s": 300.0, "peak_gib": 2.0, "mfu": 0.5, "first_step_s": 9.0},
        {"row": "a", "side": "hf", "tok_s": 100.0, "peak_gib": 4.0},
        {"row": "a", "side": "unsloth", "error": "no"},
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "| a | posttrain | 300 |  | 50% | 2.0 | 9.0 |", "| a | hf | 100 | 3.00x |  | 4.0 |  |",
        "| a | unsloth | failed | | | | |",
    ]  # fmt: skip
