"""On a CPU a run of one's own data has sizes that suit its data, as overrides of its command line."""

import json
import re
import sys
from pathlib import Path

import pytest

from posttrain import preview
from posttrain.cli import cpu_sizes
from posttrain.config.composition import compose
from posttrain.plan.__main__ import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny_tokenizer import CHATML, byte_tokenizer


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Makes the words of a run on a tokenizer of bytes and a file of answers of these lengths."""
    monkeypatch.setattr(cpu_sizes, "visible_gpus", lambda: 0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")

    def words(*lengths):
        rows = []
        for length in lengths:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * length}]
            rows.append(json.dumps({"messages": turns}))
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        return ["model=hf", f"model.path={tmp_path / 'model'}", "data=messages", f"data.path={tmp_path}/rows.jsonl"]

    return words


@pytest.mark.parametrize(
    "lengths, length, batch",
    [
        ([10, 30], 256, 8),  # the demo's
        ([300, 10], 704, 2),  # two of the longest
        ([900, 10], 1024, 2),
        ([3000], 3072, 1),
    ],
)
def test_sequences_hold_the_longest_conversation(words, lengths, length, batch, capsys):
    given = words(*lengths)
    added = [f"trainer.seq_length={length}", f"trainer.global_batch_size={batch}"]
    assert cpu_sizes.complete(given, "config") == [*given, *added]
    assert f"on a CPU: {' '.join(added)}: the longest sample fits" in capsys.readouterr().err
    cfg = compose([*given, *added])
    assert (cfg.trainer.seq_length, cfg.trainer.global_batch_size) == (length, batch)


def test_preview_and_plan_show_what_the_run_does(words, tmp_path, capsys, monkeypatch):
    given = words(300, 10)
    added = ["trainer.seq_length=704", "trainer.global_batch_size=2"]
    assert cpu_sizes.complete(given, "config") == [*given, *added]
    monkeypatch.setattr(sys, "argv", ["posttrain.preview", *given, "preview.limit=1"])
    preview.main()
    assert re.search(r"train: sequences +1 of 704 tokens", capsys.readouterr().out)
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 4096}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    plan_words = [*given, "model.random_init=true", "plan.json=true"]
    plan(compose(plan_words, "plan"), plan_words)
    assert json.loads(capsys.readouterr().out)["sizes_on_this_cpu"] == added
    plan(compose([*plan_words, "plan.gpu=h100"], "plan"), plan_words)
    assert json.loads(capsys.readouterr().out)["sizes_on_this_cpu"] == []


def test_a_batch_is_divided_by_the_processes(words):
    given = [*words(3000), "parallelism.nproc_per_node=2"]
    assert cpu_sizes.complete(given, "config")[-1] == "trainer.global_batch_size=2"
    given = [*words(10), "trainer.micro_batch_size=auto"]
    assert cpu_sizes.complete(given, "config")[-1] == "trainer.global_batch_size=8"


def test_plain_text_is_cut_into_short_windows(words, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 5000)
    model = words(1)[:2]
    given = [*model, "objective=text", f"data.path={tmp_path}/a.txt"]
    assert cpu_sizes.complete(given, "config")[-2:] == ["trainer.seq_length=512", "trainer.global_batch_size=4"]


def test_a_sweep_has_one_length(words):
    given = ["--multirun", *words(300), "data.packing=true,false", "optimizer.lr=1e-3,1e-4"]
    assert cpu_sizes.complete(given, "config")[-2:] == ["trainer.seq_length=704", "trainer.global_batch_size=2"]


def test_data_that_cannot_be_read_are_left_to_the_run(words, tmp_path):
    given = words(10)
    (tmp_path / "rows.jsonl").write_text("{")
    assert cpu_sizes.complete(given, "config") == given


@pytest.mark.parametrize(
    "more", [["trainer.seq_length=4096"], ["launch.submit=true"], ["experiment=lora_qwen3_8b"], ["launch.nnodes=2"]]
)
def test_what_was_chosen_stays(words, more):
    given = [*words(10), *more]
    assert cpu_sizes.complete(given, "config") == given


def test_only_own_data_on_a_cpu(words, monkeypatch):
    assert cpu_sizes.complete(["peft.rank=8"], "config") == ["peft.rank=8"]
    assert cpu_sizes.complete(["data=demo"], "config") == ["data=demo"]
    given = [*words(10), "trainer.global_batch_size=4"]
    assert cpu_sizes.complete(given, "config") == [*given, "trainer.seq_length=256"]
    monkeypatch.setattr(cpu_sizes, "visible_gpus", lambda: 1)
    assert cpu_sizes.complete(given, "config") == given
