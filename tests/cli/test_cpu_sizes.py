"""On a CPU a run of one's own data has sizes that suit its data, as overrides of its command line."""

import json
import sys
from pathlib import Path

import pytest

from posttrain.cli import cpu_sizes
from posttrain.config.composition import compose

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
    assert cpu_sizes.complete(given) == [*given, *added]
    assert f"on a CPU: {' '.join(added)}: the longest sample fits" in capsys.readouterr().err
    cfg = compose([*given, *added])
    assert (cfg.trainer.seq_length, cfg.trainer.global_batch_size) == (length, batch)


def test_a_batch_is_divided_by_the_processes(words):
    given = [*words(3000), "parallelism.nproc_per_node=2"]
    assert cpu_sizes.complete(given)[-1] == "trainer.global_batch_size=2"


def test_plain_text_is_cut_into_short_windows(words, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 5000)
    model = words(1)[:2]
    given = [*model, "objective=text", f"data.path={tmp_path}/a.txt"]
    assert cpu_sizes.complete(given)[-2:] == ["trainer.seq_length=512", "trainer.global_batch_size=4"]


def test_a_sweep_has_one_length(words):
    given = ["--multirun", *words(300), "data.packing=true,false", "optimizer.lr=1e-3,1e-4"]
    assert cpu_sizes.complete(given)[-2:] == ["trainer.seq_length=704", "trainer.global_batch_size=2"]


def test_data_that_cannot_be_read_are_left_to_the_run(words, tmp_path):
    given = words(10)
    (tmp_path / "rows.jsonl").write_text("{")
    assert cpu_sizes.complete(given) == given


@pytest.mark.parametrize(
    "more", [["trainer.seq_length=4096"], ["launch.submit=true"], ["experiment=lora_qwen3_8b"], ["launch.nnodes=2"]]
)
def test_what_was_chosen_stays(words, more):
    given = [*words(10), *more]
    assert cpu_sizes.complete(given) == given


def test_only_own_data_on_a_cpu(words, monkeypatch):
    assert cpu_sizes.complete(["peft.rank=8"]) == ["peft.rank=8"]
    assert cpu_sizes.complete(["data=demo"]) == ["data=demo"]
    given = [*words(10), "trainer.global_batch_size=4"]
    assert cpu_sizes.complete(given) == [*given, "trainer.seq_length=256"]
    monkeypatch.setattr(cpu_sizes, "visible_gpus", lambda: 1)
    assert cpu_sizes.complete(given) == given
