"""The rows, steps and tokens that are planned are those of a run on the same data."""

import json
import random

import pytest
from test_preview import byte_tokenizer

from posttrain.cli.command import compose
from posttrain.config.instantiate import built
from posttrain.errors import UserError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.plan import data_stats
from posttrain.plan.data_stats import estimate_data
from posttrain.spec.resolve import resolve_spec

COUNT = 400
PERIOD = 20


def conversation(number, turns=1):
    """Turns whose lengths differ, much the same among any few dozens; every fifth conversation is there twice."""
    number -= number % 5 == 4
    messages = []
    for turn in range(turns):
        lengths = random.Random(number % PERIOD + PERIOD * turn)
        messages.append({"role": "user", "content": f"{number:03} {turn} " + "x" * lengths.randint(0, 50)})
        messages.append({"role": "assistant", "content": f"{number:03} " + "y" * lengths.randint(0, 90)})
    return {"messages": messages}


def document(number):
    """A text whose length differs from that of the next."""
    return {"text": f"{number:03} " + "z" * random.Random(number % PERIOD).randint(0, 700)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of rows, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("rows")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    files = {
        "rows": [conversation(number) for number in range(COUNT)],
        "others": [conversation(number + COUNT, 2) for number in range(COUNT // 2)],
        "turns": [conversation(number, 1 + number % 4) for number in range(COUNT)],
        "same": [conversation(number % 3) for number in range(COUNT)],
        "texts": [document(number) for number in range(COUNT)],
        "unusable": [conversation(number) if number % 2 else {"messages": []} for number in range(COUNT)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configuration(folder, name, *words):
    return compose([
        "model=llama32_1b", f"model.tokenizer={folder / 'tokenizer'}", "data=messages", "trainer.seq_length=512",
        f"data.path={folder / name}.jsonl", f"cache_dir={folder / 'cache'}", "trainer.global_batch_size=4",
        "trainer.max_steps=null", "trainer.epochs=1", *words,
    ])  # fmt: skip


def counts(cfg, multiple=1):
    """(rows, conversations, tokens, supervised tokens) of an epoch, as a run prepares it."""
    data = built(cfg.data)
    encoder = built(cfg.objective).encoder(data, built(cfg.template), load_tokenizer(cfg), cfg.trainer.seq_length)
    built_data = data.build(
        encoder=encoder,
        seq_length=cfg.trainer.seq_length,
        seed=cfg.seed,
        cache_dir=cfg.cache_dir,
        length_multiple=multiple,
    )
    train = built_data.report["train"]
    return [train[key] for key in ("packed_sequences", "conversations", "tokens", "supervised_tokens")]


def planned(stats):
    return [stats.rows, stats.conversations, stats.tokens, stats.supervised_tokens]


def several(folder, *weights):
    sources = []
    for name, weight in zip(("rows", "others"), weights, strict=True):
        sources.append(f"{{path: {folder / name}.jsonl, weight: {weight}}}")
    return ["data.path=null", f"data.sources=[{','.join(sources)}]"]


@pytest.mark.parametrize("fraction", ["null", "0.001", "0.3"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows", []),
        ("rows", ["data.packing=false"]),
        ("rows", ["data.seed=7"]),
        ("rows", ["seed=7"]),
        ("rows", ["data.max_train_rows=50"]),
        ("turns", ["data.split_turns=always"]),
        ("same", []),
        ("texts", ["data=text", "objective=text"]),
        ("texts", ["data=text", "objective=text", "objective.document_boundaries=false"]),
        ("unusable", ["data.on_error=skip"]),
    ],
)
def test_all_rows_are_read(folder, name, words, fraction):
    cfg = configuration(folder, name, *words, f"data.validation_fraction={fraction}")
    stats = estimate_data(cfg)
    assert planned(stats) == counts(cfg)
    assert stats.all_read


@pytest.mark.parametrize("fraction", ["null", "0.1"])
@pytest.mark.parametrize("weights", [(1, 1), (2.5, 0.5), (0, 1), (3, 0.1)])
@pytest.mark.parametrize("most", ["null", "60"])
def test_sources_count_by_their_weights(folder, weights, fraction, most):
    words = [*several(folder, *weights), f"data.validation_fraction={fraction}", f"data.max_train_rows={most}"]
    cfg = configuration(folder, "rows", *words)
    assert planned(estimate_data(cfg)) == counts(cfg)


def test_conversations_padded_for_context_parallelism(folder):
    """More rows than without, by the padding of each conversation."""
    cfg = configuration(folder, "rows", "parallelism=cp4", "trainer.seq_length=256")
    multiple = resolve_spec(cfg, 4).conversation_multiple
    assert multiple > 1
    stats = estimate_data(cfg, multiple)
    assert planned(stats) == counts(cfg, multiple)
    assert stats.rows > estimate_data(cfg).rows


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows", []),
        ("turns", ["data.split_turns=always"]),
        ("texts", ["data=text", "objective=text", "objective.document_boundaries=false"]),
        ("unusable", ["data.on_error=skip"]),
    ],
)
@pytest.mark.parametrize("fraction", ["null", "0.1"])
@pytest.mark.parametrize("seconds", [1e3, 0.0], ids=["counted", "by lines"])
def test_a_sample_stands_for_all(folder, name, words, fraction, seconds, monkeypatch):
    """No time to read all: what a row becomes, and whether it can be used, is counted with it."""
    cfg = configuration(folder, name, *words, f"data.validation_fraction={fraction}")
    whole = planned(estimate_data(cfg))
    monkeypatch.setattr(data_stats, "LEAST", 150)
    monkeypatch.setattr(data_stats, "SECONDS", 0.0)
    monkeypatch.setattr(data_stats, "COUNT_SECONDS", seconds)
    stats = estimate_data(cfg)
    assert not stats.all_read and 150 <= stats.read < COUNT
    assert planned(stats) == pytest.approx(whole, rel=0.05)


def test_nothing_left_to_train_on(folder):
    cfg = configuration(folder, "rows", *several(folder, 0, 0))
    with pytest.raises(UserError, match="no conversation is left to train on"):
        estimate_data(cfg)


def test_plans_of_one_command_read_the_same_rows_once(folder, monkeypatch):
    reads = []
    read = data_stats._read

    def counted(*arguments):
        reads.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(data_stats, "_read", counted)
    kept = {}
    cfg = configuration(folder, "rows")
    first = estimate_data(cfg, kept=kept)
    batched = configuration(folder, "rows", "trainer.global_batch_size=64", "peft=none", "parallelism=tp2")
    assert planned(estimate_data(batched, kept=kept)) == planned(first)
    assert len(reads) == 1
    shorter = configuration(folder, "rows", "trainer.seq_length=128")
    assert planned(estimate_data(shorter, kept=kept)) == counts(shorter)
    other = configuration(folder, "turns")
    assert planned(estimate_data(other, kept=kept)) == counts(other)
    assert len(reads) == 3
