"""The demo instruction set: the files, the split, and every record checked against its sentence."""

import json
import re
from collections import Counter

import pytest

from posttrain.demo import data

WORDS = dict(zip(data.NUMBERS, range(2, 13), strict=True))
TIME = re.compile(r"\bat (?:(?P<noon>noon)|(?P<hour>\d+)(?::(?P<minute>\d\d))? ?(?P<half>am|pm)?)\b")


@pytest.fixture(scope="module")
def rows():
    return data.make_rows()


def test_files_are_messages_and_are_written_once(tmp_path):
    folder = data.ensure_sentences(tmp_path)
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation")}
    assert (len(lines["train"]), len(lines["validation"])) == (2400, 240)
    for line in lines["train"] + lines["validation"]:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert list(json.loads(messages[2]["content"])) == ["kind", "who", "what", "num", "day", "at"]
        assert sum(len(message["content"]) for message in messages) < 250  # about 90 tokens with the chat template
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert data.ensure_sentences(tmp_path) == folder
    assert (folder / "train.jsonl").stat().st_mtime_ns == before


def test_the_same_on_every_machine(tmp_path):
    assert data.ensure_sentences(tmp_path).name == "sentences-8e7917bfa109"  # a change here changes published results


def test_validation_is_unseen(rows):
    train, validation = rows["train"], rows["validation"]
    for key in ("who", "what"):
        assert not {r[key] for _, r in train} & {r[key] for _, r in validation}
    assert len({s for s, _ in train + validation}) == len(train) + len(validation)


def test_every_kind_and_every_absent_field_is_common(rows):
    records = [record for _, record in rows["train"]]
    assert min(Counter(record["kind"] for record in records).values()) > 300
    for key in ("num", "day", "at"):
        assert 0.1 < sum(record[key] is None for record in records) / len(records) < 0.5


def test_records_say_what_the_sentences_say(rows):
    for sentence, record in rows["train"] + rows["validation"]:
        assert record["who"] in sentence and record["what"].lower() in sentence.lower(), sentence
        days = [day[:3].lower() for day in data.DAYS if day in sentence]
        assert days == ([record["day"]] if record["day"] else []), sentence
        found = TIME.search(sentence[0].lower() + sentence[1:])
        assert _clock(found) == record["at"], sentence
        rest = sentence.replace(found.group()[3:] if found else "\0", "").replace(record["what"], "").lower()
        numbers = [
            int(word) if word.isdigit() else WORDS[word] for word in re.findall(r"\w+", rest) if _is_number(word)
        ]
        assert numbers == ([record["num"]] if record["num"] else []), sentence


def _is_number(word):
    return word.isdigit() or word in WORDS


def _clock(found):
    if found is None:
        return None
    if found["noon"]:
        return "12:00"
    hour = int(found["hour"])
    if found["half"]:
        hour = hour % 12 + 12 * (found["half"] == "pm")
    return f"{hour:02}:{found['minute'] or '00'}"


@pytest.mark.parametrize("sentence, tidy", [("on Monday  .", "On Monday."), ("a , b  ? c", "A, b? c")])
def test_gaps_are_closed(sentence, tidy):
    assert data._tidy(sentence) == tidy
