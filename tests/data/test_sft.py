"""TrainingData.build: from files to datasets, its cache, splits, lengths and mixes."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import byte_tokenizer

from posttrain.config.composition import compose
from posttrain.config.instantiate import built
from posttrain.data import TrainingData, cached, prepare
from posttrain.data.formats import Messages, Oasst, PromptCompletion
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.objectives import SFT


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count, start=0, size=3):
    return [{"prompt": f"q{i}", "completion": f"a{i} " * (1 + i % size)} for i in range(start, start + count)]


def build(
    tokenizer, tmp_path, seq_length=256, seed=1, build=True, length_multiple=1, used=None, data_seed=None, **options
):
    options.setdefault("format", PromptCompletion())
    data = TrainingData(seed=data_seed, **options)
    return data.build(
        encoder=SFT().encoder(data, ChatTemplate(), tokenizer, seq_length),
        seq_length=seq_length,
        seed=seed,
        cache_dir=tmp_path / "cache",
        build=build,
        length_multiple=length_multiple,
        used=used,
    )


def texts(tokenizer, bins):
    """The text of every conversation in the bins."""
    found = []
    for i in range(len(bins)):
        item = bins[i]
        ends = np.cumsum(item["seq_lens"])
        found += [tokenizer.decode(item["input_ids"][a:b]) for a, b in zip(ends - item["seq_lens"], ends, strict=True)]
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_items(tokenizer, tmp_path, packing):
    path = write(tmp_path / "a.jsonl", pairs(40))
    splits = build(tokenizer, tmp_path, path=path, packing=packing)
    assert splits.validation is None and (len(splits.train) == 40) == (not packing)
    for i in range(len(splits.train)):
        item = splits.train[i]
        size = item["seq_lens"].sum()
        assert all(len(item[name]) == size for name in ("input_ids", "labels", "loss_mask", "position_ids"))
        assert [item[name].dtype for name in ("input_ids", "labels", "loss_mask")] == [np.int32, np.int32, np.uint8]
        at = 0
        for length in item["seq_lens"]:
            ids, labels = item["input_ids"][at : at + length], item["labels"][at : at + length]
            mask = item["loss_mask"][at : at + length].astype(bool)
            assert (labels[:-1] == ids[1:]).all() and not mask[-1]
            assert item["position_ids"][at : at + length].tolist() == list(range(length))
            # Trained labels are the answer and its stop token, in one run.
            question = int(tokenizer.decode(ids).split("q")[1].split("<")[0])
            assert tokenizer.decode(labels[mask]) == f"a{question} " * (1 + question % 3) + "<|im_end|>"
            at += length
    assert sorted(texts(tokenizer, splits.train))[0].startswith(
        "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na0"
    )


def test_conversations_padded_for_context_parallelism(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(40))
    plain = build(tokenizer, tmp_path, path=path).train
    padded = build(tokenizer, tmp_path, path=path, length_multiple=8).train
    assert len(texts(tokenizer, padded)) == 40
    for i in range(len(padded)):
        assert (padded[i]["seq_lens"] % 8 == 0).all() and padded[i]["seq_lens"].sum() <= 256
    trained = sum(int(padded[i]["loss_mask"].sum()) for i in range(len(padded)))
    assert trained == sum(int(plain[i]["loss_mask"].sum()) for i in range(len(plain)))


def test_report(tokenizer, tmp_path):
    rows = [*pairs(20), {"prompt": "x"}, {"prompt": "x", "completion": ""}]
    splits = build(tokenizer, tmp_path, path=write(tmp_path / "a.jsonl", rows), on_error="skip")
    counts = splits.report["rows"]
    assert (counts["rows"], counts["read"], counts["kept"]) == (22, 21, 20)  # a broken row has no conversation
    assert counts["dropped"] == {"no field `completion`": 1, "nothing to train on": 1}
    assert "line 21" in counts["examples"]["no field `completion`"]
    train = splits.report["train"]
    items = [splits.train[i] for i in range(len(splits.train))]
    assert train["tokens"] == sum(len(item["input_ids"]) for item in items)
    assert train["supervised_tokens"] == sum(int(item["loss_mask"].sum()) for item in items)
    json.dumps(splits.report)


def test_a_bad_row_stops_the_run_with_its_place(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(3), {"prompt": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: field `completion` is missing.*\n.*on_error=skip"):
        build(tokenizer, tmp_path, path=path)
    assert not list((tmp_path / "cache" / "data").glob("rows-*"))


def test_the_cache_is_used_until_something_changes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", pairs(30))
    options = {"path": path, "train_on": "assistant"}
    first = build(tokenizer, tmp_path, **options)
    made = []
    written = cached.DatasetBuilder._write
    monkeypatch.setattr(cached.DatasetBuilder, "_write", lambda *args: (made.append(args), written(*args))[1])
    again = build(tokenizer, tmp_path, **options)
    assert not made
    for i in range(len(first.train)):
        for name, values in first.train[i].items():
            assert (values == again.train[i][name]).all()
    moved = write(tmp_path / "moved.jsonl", pairs(30))
    build(tokenizer, tmp_path, path=moved)
    assert not made  # the same content under another name
    changes = [
        lambda: build(tokenizer, tmp_path, path=path, train_on="all"),
        lambda: build(tokenizer, tmp_path, path=path, max_length=100),
        lambda: build(tokenizer, tmp_path, path=path, truncation="drop"),
        lambda: build(tokenizer, tmp_path, path=path, format=PromptCompletion(system="prompt")),
        lambda: build(byte_tokenizer(bos="<s>"), tmp_path, path=path),
        lambda: build(
            byte_tokenizer(tokenizer.chat_template.replace("role'] +", "role'] + ' ' +")), tmp_path, path=path
        ),
        lambda: build(tokenizer, tmp_path, path=write(tmp_path / "a.jsonl", pairs(31))),
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert len(made) == number
    before = len(made)
    other = build(tokenizer, tmp_path, path=moved, seed=2)
    assert len(made) == before and any(
        (first.train[i]["seq_lens"].tolist() != other.train[i]["seq_lens"].tolist())
        or (first.train[i]["input_ids"].tolist() != other.train[i]["input_ids"].tolist())
        for i in range(min(len(first.train), len(other.train)))
    )


# A fork of this process would lack the threads that its locks wait for. The server of the forks has none, and imports
# once what takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["transformers.tokenization_utils_tokenizers", "torch"])


def _build_in_process(tmp_path, path, queue, may_build):
    splits = build(byte_tokenizer(), tmp_path, path=path, build=may_build)
    queue.put((os.getpid(), splits.train[0]["input_ids"].tolist()))


def test_one_process_builds_and_the_others_wait(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(3000))
    queue = FORKS.Queue()
    workers = [FORKS.Process(target=_build_in_process, args=(tmp_path, path, queue, rank == 0)) for rank in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len({pid for pid, _ in results}) == 3 and len({tuple(ids) for _, ids in results}) == 1
    assert len(list((tmp_path / "cache" / "data").glob("rows-*"))) == 1


def test_killed_in_the_middle_leaves_nothing_that_is_taken_for_data(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(40_000))
    queue = FORKS.Queue()
    worker = FORKS.Process(target=_build_in_process, args=(tmp_path, path, queue, True))
    worker.start()
    folder = tmp_path / "cache" / "data"
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in folder.glob(".rows-*.tmp*/rows.arrow")):
        assert time.monotonic() < deadline and worker.is_alive()
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not list(folder.glob("rows-*"))
    path = write(tmp_path / "a.jsonl", pairs(200))
    assert build(tokenizer, tmp_path, path=path).report["train"]["conversations"] == 200


def test_held_out_conversations_are_never_trained_on_duplicates_included(tokenizer, tmp_path):
    rows = pairs(100) + pairs(50) + pairs(20)
    path = write(tmp_path / "a.jsonl", rows)
    splits = build(tokenizer, tmp_path, path=path, validation_fraction=0.1)
    train, validation = (set(texts(tokenizer, bins)) for bins in (splits.train, splits.validation))
    assert len(validation) == 10 and len(train) == 90 and not train & validation
    assert splits.report["train"]["conversations"] + splits.report["validation"]["conversations"] == 170
    assert splits.report["validation"]["also_in_train"] == 0
    same = build(tokenizer, tmp_path, path=write(tmp_path / "b.jsonl", rows[::-1]), validation_fraction=0.1)
    assert set(texts(tokenizer, same.validation)) == validation
    again = build(tokenizer, tmp_path, path=path, validation_fraction=0.1, seed=7)
    assert set(texts(tokenizer, again.validation)) == validation  # for every seed of a run
    other = build(tokenizer, tmp_path, path=path, validation_fraction=0.1, data_seed=7)
    assert set(texts(tokenizer, other.validation)) != validation


def chats(count, copies=1, **more):
    """`copies` of each conversation that differ in the ids of their messages alone."""
    rows = []
    for copy in range(copies):
        for number in range(count):
            messages = [
                {"role": "user", "content": f"q{number}"},
                {"role": "assistant", "content": f"a{number}", "id": f"{copy}-{number}"},
            ]
            rows.append({"messages": messages, **more})
    return rows


def test_what_is_rendered_alike_is_on_one_side(tokenizer, tmp_path):
    """Ids of messages make no other conversation."""
    path = write(tmp_path / "a.jsonl", chats(20, copies=10))
    splits = build(tokenizer, tmp_path, path=path, format=Messages(), validation_fraction=0.3)
    train, validation = (set(texts(tokenizer, bins)) for bins in (splits.train, splits.validation))
    assert (len(train), len(validation)) == (14, 6) and not train & validation
    assert splits.report["validation"]["also_in_train"] == 0
    assert splits.names().count("validation") == 60


def test_a_tree_is_on_one_side(tokenizer, tmp_path):
    """All branches of a tree, and those of another tree with the same conversation."""
    trees = []
    for number in range(20):
        answers = [{"role": "assistant", "text": f"a{number}-{reply}", "replies": []} for reply in range(3)]
        trees.append({"prompt": {"role": "prompter", "text": f"q{number}", "replies": answers}})
    trees.append({"prompt": {**trees[0]["prompt"], "replies": [*trees[0]["prompt"]["replies"][:1], {
        "role": "assistant", "text": "another", "replies": []}]}})  # fmt: skip
    path = write(tmp_path / "a.jsonl", trees)
    splits = build(tokenizer, tmp_path, path=path, format=Oasst("all"), validation_fraction=0.3)
    questions = []
    for bins in (splits.train, splits.validation):
        questions.append({text.split("<|im_end|>")[0] for text in texts(tokenizer, bins)})
    assert not questions[0] & questions[1] and [len(side) for side in questions] == [14, 6]


def test_turns_of_a_conversation_are_on_one_side(tokenizer, tmp_path):
    rows = []
    for number in range(20):
        messages = []
        for turn in range(3):
            messages += [{"role": "user", "content": f"q{number}-{turn}"}, {"role": "assistant", "content": "yes"}]
        rows.append({"messages": messages})
    path = write(tmp_path / "a.jsonl", rows)
    splits = build(tokenizer, tmp_path, path=path, format=Messages(), validation_fraction=0.3, split_turns="always")
    assert splits.report["notes"] == ["data.split_turns=always: 20 of 20 conversations became 60, one for each turn"]
    sides = []
    for bins in (splits.train, splits.validation):
        found = texts(tokenizer, bins)
        assert len(found) == 3 * len({text.split("-")[0] for text in found})
        sides.append(len(found))
    assert sides == [42, 18]


def test_split_turns_goes_with_every_answer():
    for train_on in ("last", "all"):
        with pytest.raises(
            UserError, match=f"data.split_turns=always: goes with data.train_on=assistant, not {train_on}"
        ):
            TrainingData(path="a", format=Messages(), split_turns="always", train_on=train_on)


def test_nothing_to_hold_out_is_said(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", chats(1, copies=50))
    splits = build(tokenizer, tmp_path, path=path, format=Messages(), validation_fraction=0.5)
    assert splits.validation is None
    assert splits.report["notes"] == [
        "data.validation_fraction=0.5: nothing is held out: all of the 50 conversations are the same, or of one tree"
    ]


def test_columns_that_are_not_read_are_reported_of_every_source(tokenizer, tmp_path):
    sources = [{"path": write(tmp_path / f"{mood}.jsonl", chats(3, mood=mood))} for mood in ("good", "bad")]
    splits = build(tokenizer, tmp_path, sources=sources, format=Messages())
    assert splits.report["rows"]["unread"] == {"mood": 6}
    assert splits.report["rows"]["examples"]["mood"].endswith("good.jsonl, line 1: 'good'")


def test_the_date_is_part_of_the_caches_name(tokenizer, tmp_path, monkeypatch):
    """A template that writes today's date, also one that the tokenizer keeps for tools alone."""
    dated = byte_tokenizer()
    dated.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ strftime_now('%F') }}"}
    options = TrainingData(path="a", format=Messages())
    names = set()
    for day in ("2024-01-01", "2024-01-02"):
        monkeypatch.setattr(prepare.time, "strftime", lambda form, day=day: day)
        for other in (dated, tokenizer):
            names.add(str(SFT().encoder(options, ChatTemplate(), other, 64).identity))
    assert len(names) == 3


def test_an_own_validation_file(tokenizer, tmp_path):
    path, own = write(tmp_path / "a.jsonl", pairs(20)), write(tmp_path / "v.jsonl", pairs(8, start=15))
    splits = build(tokenizer, tmp_path, path=path, validation_path=own, max_validation_rows=6)
    assert splits.report["validation"]["conversations"] == 6 and splits.report["validation"]["also_in_train"] == 5


def test_sources_with_weights(tokenizer, tmp_path):
    sources = [
        {"path": write(tmp_path / "a.jsonl", pairs(10)), "weight": 2.5},
        {"path": write(tmp_path / "b.jsonl", [{"messages": [
            {"role": "user", "content": f"b{i}"}, {"role": "assistant", "content": "x"}]} for i in range(8)]),
         "weight": 0.5, "format": Messages()},
    ]  # fmt: skip
    splits = build(tokenizer, tmp_path, sources=sources)
    found = texts(tokenizer, splits.train)
    assert sum("\nq" in text for text in found) == 25 and sum("\nb" in text for text in found) == 4
    assert max(found.count(text) for text in found) == 3


def test_sources_of_a_configuration(tokenizer, tmp_path):
    """Each with a format and several files of its own, which no longer are what a configuration holds."""
    paths = [write(tmp_path / f"{name}.jsonl", pairs(2, start)) for name, start in (("a", 0), ("b", 2))]
    own = write(tmp_path / "c.jsonl", [{"instruction": "c", "input": "", "output": "x"}])
    form = "{_target_: posttrain.data.formats.Alpaca, metadata: [note]}"
    words = f"data.sources=[{{path: [{paths[0]}, {paths[1]}], weight: 2}}, {{path: {own}, format: {form}}}]"
    data = built(compose(["data=prompt_completion", words]).data)
    encoder = SFT().encoder(data, ChatTemplate(), tokenizer, 256)
    splits = data.build(encoder=encoder, seq_length=256, seed=0, cache_dir=tmp_path / "cache")
    found = texts(tokenizer, splits.train)
    assert sum("\nq" in text for text in found) == 8 and sum("\nc" in text for text in found) == 1


def test_first_rows_only(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(1000))
    splits = build(tokenizer, tmp_path, path=path, max_train_rows=5, packing=False)
    assert [text.split("q")[1].split("<")[0] for text in texts(tokenizer, splits.train)] == list("01234")


LONG = {
    "messages": [
        {"role": "system", "content": "S"},
        *(
            {"role": role, "content": f"{role[0]}{turn}" + "x" * 20}
            for turn in range(6)
            for role in ("user", "assistant")
        ),
    ]
}


@pytest.mark.parametrize(("side", "kept", "gone"), [("right", "u0", "u5"), ("left", "u5", "u0")])
def test_whole_turns_are_kept(tokenizer, tmp_path, side, kept, gone):
    path = write(tmp_path / "a.jsonl", [LONG])
    splits = build(tokenizer, tmp_path, path=path, format=Messages(), max_length=200, truncation_side=side)
    (text,) = texts(tokenizer, splits.train)
    assert kept in text and gone not in text and text.startswith("<|im_start|>system\nS<|im_end|>")
    assert text.endswith("<|im_end|>\n") and text.count("user") == text.count("assistant") > 1
    assert len(splits.train[0]["input_ids"]) <= 200 and splits.report["rows"]["truncated"] == 1


def test_too_long_is_dropped_or_an_error(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [LONG, *({"messages": LONG["messages"][:3]} for _ in range(2))])
    options = {"path": path, "format": Messages(), "max_length": 100}
    splits = build(tokenizer, tmp_path, truncation="drop", **options)
    assert splits.report["rows"]["dropped"] == {"longer than max_length": 1}
    with pytest.raises(UserError, match=r"line 1: \d+ tokens, more than data.max_length=100"):
        build(tokenizer, tmp_path, truncation="error", **options)
    options["max_length"] = 10
    with pytest.raises(UserError, match=r"nothing is left to train on; left out: \d \([a-z]"):
        build(tokenizer, tmp_path, truncation="truncate", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "a", "train_on": "user"}, "data.train_on=user: must be one of assistant, last, all"),
        ({"path": "a", "truncation": "cut"}, "data.truncation=cut"),
        ({}, "data.path: give the file"),
        ({"path": "a", "sources": [{"path": "b"}]}, "data.path and data.sources exclude each other"),
        ({"path": "demo:sentences", "sources": [{"path": "b"}]}, "data.sources: .* with data=NAME"),
        ({"path": "a", "validation_fraction": 1.0}, "between 0 and 1"),
        ({"path": "a", "validation_fraction": 0.1, "validation_path": "b"}, "exclude each other"),
        ({"path": "a", "max_length": 0}, "data.max_length=0"),
        ({"path": "a", "max_length": 512}, "data.max_length=512: above trainer.seq_length=256"),
        ({"sources": [{"file": "b"}]}, r"data.sources\[0\]: needs `path`"),
        ({"sources": [{"path": "b", "weight": -1}]}, "weight=-1"),
    ],
)
def test_wrong_options(tokenizer, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(tokenizer, tmp_path, **options)


def test_pickled_for_loader_processes(tokenizer, tmp_path):
    import pickle

    splits = build(tokenizer, tmp_path, path=write(tmp_path / "a.jsonl", pairs(20)))
    raw = pickle.dumps(splits.train)
    copy = pickle.loads(raw)
    assert (copy[0]["input_ids"] == splits.train[0]["input_ids"]).all() and len(raw) < 20_000


def test_batches_end_early_where_rows_are_large(tokenizer, tmp_path, monkeypatch):
    """They hold no more characters than they may, and the rows are the same, in order."""
    path = write(tmp_path / "a.jsonl", pairs(40))
    whole = build(tokenizer, tmp_path / "whole", path=path, packing=False)
    sizes = []
    make = prepare.batches

    def watched(rows):
        for batch in make(rows):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(prepare, "batches", watched)
    monkeypatch.setattr(prepare, "CHARACTERS", 200)
    cut = build(tokenizer, tmp_path / "cut", path=path, packing=False)
    assert sum(sizes) == 40 and 1 < max(sizes) < 10
    assert texts(tokenizer, cut.train) == texts(tokenizer, whole.train)
