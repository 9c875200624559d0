"""Continued pre-training: documents, windows, and what is refused."""

import gzip
import json

import numpy as np
import pytest
from tiny_tokenizer import byte_tokenizer

from posttrain.data import TrainingData, readers
from posttrain.data.formats import Alpaca
from posttrain.data.formats import Text as TextFormat
from posttrain.data.prepare import Counts
from posttrain.data.sources import Source, rows
from posttrain.errors import UserError
from posttrain.objectives import SFT, Text

CORPUS = ["the first document, quite short", "a second one " * 9, "x", "", "the last of them, with more than a window"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def group_texts(tokenizer, texts, length):
    """As transformers' examples/pytorch/language-modeling/run_clm.py groups texts; its last, shorter one is kept."""
    ids = []
    for text in texts:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return [ids[at : at + length] for at in range(0, len(ids), length)]


def samples(tokenizer, folder, texts, length, **options):
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TrainingData(format=TextFormat(), path=str(path))
    encoder = Text(**options).encoder(data, None, tokenizer, length)
    return list(data.samples(encoder, folder))


@pytest.mark.parametrize("length", [8, 31, 64, 4096])
def test_a_stream_is_cut_as_run_clm_does(tokenizer, tmp_path, length):
    found = samples(tokenizer, tmp_path, CORPUS, length, document_boundaries=False)
    expected = group_texts(tokenizer, filter(None, CORPUS), length)
    assert [sample.encoded.input_ids.tolist() for sample in found] == [ids for ids in expected if len(ids) > 1]
    assert all(sample.encoded.mask.all() for sample in found)


@pytest.mark.parametrize("length", [8, 31, 64, 4096])
def test_documents_are_cut_by_themselves(tokenizer, tmp_path, length):
    found = samples(tokenizer, tmp_path, CORPUS, length)
    expected = [ids for text in filter(None, CORPUS) for ids in group_texts(tokenizer, [text], length) if len(ids) > 1]
    assert [sample.encoded.input_ids.tolist() for sample in found] == expected
    assert {sample.place.row for sample in found} == {0, 1, 2, 4}


@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize("overlap", [1, 3, 7])
def test_with_an_overlap_every_token_has_one_loss(tokenizer, tmp_path, overlap, boundaries):
    """All but the first of a document, or of the stream."""
    texts = list(filter(None, CORPUS))
    found = samples(tokenizer, tmp_path, texts, 8, overlap=overlap, document_boundaries=boundaries)
    streams = [texts] if not boundaries else [[text] for text in texts]
    whole = [token for stream in streams for ids in group_texts(tokenizer, stream, 10**6) for token in ids[1:]]
    supervised = []
    for sample in found:
        mask = sample.encoded.mask.astype(bool)
        mask[0] = False  # nothing before it predicts it
        supervised += sample.encoded.input_ids[mask].tolist()
    assert supervised == whole


def test_without_an_end_token(tokenizer, tmp_path):
    (sample,) = samples(tokenizer, tmp_path, ["abc"], 64, append_eos=False)
    assert sample.encoded.input_ids.tolist() == tokenizer("abc").input_ids


def test_packed_windows_do_not_see_each_other(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {index} of it" for index in range(50)) + "\n")
    data = TrainingData(format=TextFormat(split="line"), path=str(path), validation_fraction=0.2)
    encoder = Text().encoder(data, None, tokenizer, 64)
    splits = data.build(encoder=encoder, seq_length=64, seed=1, cache_dir=tmp_path / "cache")
    assert splits.report["unit"] == "window"
    assert splits.report["train"]["conversations"] == 40
    row = splits.train[0]
    assert len(row["seq_lens"]) > 1
    assert row["position_ids"][row["seq_lens"][0]] == 0
    assert Text().weights(row).sum() == row["seq_lens"].sum() - len(row["seq_lens"])
    again = data.build(encoder=encoder, seq_length=64, seed=1, cache_dir=tmp_path / "cache")
    assert np.array_equal(again.train[0]["input_ids"], row["input_ids"])


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", ["One.\nTwo.\n\n\nThree.", "Four."]),
        ("paragraph", ["One.\nTwo.", "", "Three.", "Four."]),
        ("line", ["One.", "Two.", "", "", "Three.", "Four."]),
    ],
)
def test_documents_of_text_files(tmp_path, split, expected):
    (tmp_path / "a.txt").write_text("\ufeffOne.\nTwo.\n\n\nThree.\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("Four.")
    found = list(rows(Source(str(tmp_path), TextFormat(split=split)), tmp_path))
    assert [document.text for _, document in found] == expected


def test_a_column(tmp_path):
    (tmp_path / "a.csv").write_text("title,content\nA,first\nB,second\n")
    found = list(rows(Source(str(tmp_path / "a.csv"), TextFormat(column="content")), tmp_path))
    assert [document.text for _, document in found] == ["first", "second"]


def test_rows_that_are_no_documents(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n{"other": "x"}\n{"text": " "}\n')
    data = TrainingData(format=TextFormat(), path=str(path))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: field `text`: expected text, found int"):
        list(data.samples(Text().encoder(data, None, tokenizer, 64), tmp_path))
    data = TrainingData(format=TextFormat(), path=str(path), on_error="skip")
    counts = Counts()
    encoder = Text().encoder(data, None, tokenizer, 64)
    (batch,) = encoder.samples(rows(Source(str(path), data.format), tmp_path), counts)
    assert len(batch) == counts.kept == 1
    assert counts.dropped == {"field `text` is not text": 1, "no field `text`": 1, "an empty document": 1}


def test_a_document_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 20)
    (tmp_path / "a.txt").write_text("0123456789\n" * 3)
    with pytest.raises(UserError, match=r"data\.format\.split=paragraph or line"):
        list(rows(Source(str(tmp_path), TextFormat()), tmp_path))
    assert len(list(rows(Source(str(tmp_path), TextFormat(split="line")), tmp_path))) == 3


def data_of(**options):
    return TrainingData(path="x", **options)


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        (SFT(), data_of(format=TextFormat()), r"`data\.format`: reads documents, not conversations; choose objective="),
        (Text(), data_of(format=Alpaca()), r"`data\.format`: reads conversations, not documents; choose data=text"),
        (Text(), data_of(format=TextFormat(), train_on="all"), r"`data\.train_on`: has no effect with objective=text"),
        (Text(), data_of(format=TextFormat(), max_length=9), r"`data\.max_length`: has no effect"),
        (Text(overlap=64), data_of(format=TextFormat()), r"objective\.overlap=64: must be at least 0 and below"),
        (Text(overlap=-1), data_of(format=TextFormat()), r"objective\.overlap=-1"),
    ],
)
def test_what_does_not_go_together(objective, data, message):
    with pytest.raises(UserError, match=message):
        objective.check(data, 64)


def test_a_tokenizer_without_an_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"objective\.append_eos=false"):
        samples(tokenizer, tmp_path, ["a"], 64)
