"""What a row holds is trained, shown to the model, known as metadata, or named: never lost in silence."""

import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from row_cases import (
    ASKED,
    CALL_AND_ANSWER,
    CASES,
    FULL,
    NEXT_MARKER,
    RESULT,
    SUMS,
    THOUGHT,
    answer,
    call,
    table,
    user,
)
from tiny_tokenizer import CHATML, byte_tokenizer

from posttrain.data import sources
from posttrain.data.formats import Alpaca, Messages, Oasst, ShareGPT
from posttrain.data.formats.text import Text
from posttrain.data.prepare import ConversationEncoder, Counts
from posttrain.data.render import Renderer
from posttrain.data.rules import Rules
from posttrain.data.sources import Source
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def encode(
    tokenizer, path, form, template=FULL, train_on="assistant", on_error="error", split_turns="never", **options
):
    """The samples of a file, and what was counted."""
    renderer = Renderer(ChatTemplate(name="tested", jinja=template, **options), tokenizer)
    rules = Rules(train_on, 4096, "truncate", "right", on_error, split_turns)
    counts = Counts()
    rows = sources.rows(Source(str(path), form), path.parent)
    batches = ConversationEncoder(renderer, tokenizer, rules).samples(rows, counts)
    return [sample for batch in batches for sample in batch], counts


def runs(tokenizer, sample):
    """The text of each trained run."""
    found, run = [], []
    for token, on in zip(sample.encoded.input_ids.tolist(), sample.encoded.mask.tolist(), strict=True):
        if on:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return [*found, tokenizer.decode(run)] if run else found


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", CASES)
def test_kinds_of_rows(tokenizer, tmp_path, name):
    case = CASES[name]
    path = write(tmp_path, [case.row])
    if case.refused:
        with pytest.raises(UserError, match=case.refused):
            encode(tokenizer, path, case.format, case.template, **case.options)
        samples, counts = encode(tokenizer, path, case.format, case.template, on_error="skip", **case.options)
        assert not samples and sum(counts.dropped.values()) == 1
        return
    (sample,), counts = encode(tokenizer, path, case.format, case.template, **case.options)
    assert runs(tokenizer, sample) == list(case.trained)
    assert list(counts.unread) == list(case.unread)
    assert all(f"{path}, line 1" in counts.examples[field] for field in case.unread)
    if case.reference is not None:
        reference = dict(case.reference)
        messages = reference.pop("messages")
        right = tokenizer.apply_chat_template(
            messages, chat_template=case.template, tokenize=True, return_dict=False, **reference
        )
        assert sample.encoded.input_ids.tolist() == right


def test_the_documentation_has_the_table():
    assert table() in (DOCS / "rows.md").read_text(), "paste what `python tests/data/row_cases.py` prints"


LOST = [*SUMS, user("ok?"), answer("yes", tool_calls=[call({})]), RESULT, answer("8", reasoning_content="two fours")]


def test_each_turn_by_itself_keeps_its_reasoning(tokenizer, tmp_path):
    """Each is what Transformers renders of the conversation up to there, and trains that turn alone."""
    path = write(tmp_path, [{"messages": LOST}, {"messages": LOST[:2]}])
    samples, counts = encode(tokenizer, path, Messages(), split_turns="reasoning")
    assert [runs(tokenizer, sample) for sample in samples] == [
        [THOUGHT],
        ["<think>\nthree\n</think>\n\n6<|im_end|>"],
        ["yes<call>weather {}</call><|im_end|>", "<think>\ntwo fours\n</think>\n\n8<|im_end|>"],
        [THOUGHT],
    ]
    for sample, end in zip(samples, (2, 4, len(LOST), 2), strict=True):
        right = tokenizer.apply_chat_template(LOST[:end], chat_template=FULL, tokenize=True, return_dict=False)
        assert sample.encoded.input_ids.tolist() == right
    assert (counts.read, counts.kept, counts.split, counts.turns) == (2, 4, 1, 3) and not counts.unread
    assert len({sample.tree for sample in samples}) == 2 and samples[3].tree is None


def test_turns_are_split_where_it_is_asked_for(tokenizer, tmp_path):
    bare = [user("a"), answer("b", weight=0), user("c"), answer("d"), user("e")]
    path = write(tmp_path, [{"messages": bare}, {"messages": [user("f"), answer("g"), user("h"), answer("i")]}])
    for split_turns, texts in (("reasoning", [["d"], ["g", "i"]]), ("always", [["d"], ["g"], ["i"]])):
        samples, counts = encode(tokenizer, path, Messages(), split_turns=split_turns)
        expected = [[f"{text}<|im_end|>" for text in group] for group in texts]
        assert [runs(tokenizer, sample) for sample in samples] == expected
    assert (counts.split, counts.turns) == (1, 2)


def test_keys_that_parquet_adds_are_not_the_rows(tokenizer, tmp_path):
    """Arrow gives every struct the keys of all; Transformers renders the rows as they were written."""

    def row(question, name, arguments, schema):
        messages = [user(question), answer("", tool_calls=[call(arguments, name)]), answer("Done.")]
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": schema}}}
        return {"messages": messages, "tools": [tool]}

    rows = [
        row("Weather?", "weather", {"city": "Bern"}, {"city": {"type": "string"}}),
        row("A table?", "book", {"people": 4}, {"people": {"type": "integer"}}),
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert (
        None
        in pyarrow.parquet.read_table(path).to_pylist()[0]["tools"][0]["function"]["parameters"]["properties"].values()
    )
    samples, _ = encode(tokenizer, path, Messages())
    for sample, given in zip(samples, rows, strict=True):
        right = tokenizer.apply_chat_template(
            given["messages"], tools=given["tools"], chat_template=FULL, tokenize=True, return_dict=False
        )
        assert sample.encoded.input_ids.tolist() == right


def test_times_of_parquet_are_text(tokenizer, tmp_path):
    """Ignored in a key that nobody reads, ISO text in one that the template writes."""
    at = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    rows = [{"conversations": [{"from": "human", "value": "hi", "at": at}, {"from": "gpt", "value": "ho", "at": None}]}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (sample,), counts = encode(tokenizer, path, ShareGPT(), CHATML)
    assert runs(tokenizer, sample) == ["ho<|im_end|>"] and counts.unread == {"messages.at": 1}
    dated = CHATML.replace("message['role'] +", "message['role'] + (message['at'] or '') +")
    (sample,), counts = encode(tokenizer, path, ShareGPT(), dated)
    assert f"user{at.isoformat()}\nhi" in sample.text and not counts.unread


def test_half_a_character_is_refused_by_its_field(tokenizer, tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c \ud83d"}]
    for name in ("rows.jsonl", "rows.json"):
        path = write(tmp_path, rows, name)
        if name == "rows.json":
            path.write_text(json.dumps(rows))
        with pytest.raises(UserError, match=r"(line 2|row 1).*field `output`: holds half of a character"):
            encode(tokenizer, path, Alpaca())
        samples, counts = encode(tokenizer, path, Alpaca(), on_error="skip")
        assert len(samples) == 1 and counts.dropped == {"text with half of a character": 1}


def test_a_turn_that_the_next_message_ends(tokenizer):
    """Without the markers' names the error says which they are."""
    with pytest.raises(UserError, match=r"marker of the next message: template.stop_tokens=\['<\|endoftext\|>'"):
        Renderer(ChatTemplate(jinja=NEXT_MARKER), tokenizer)


def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path):
    path = tmp_path / "a.jinja"
    path.write_text(CHATML, encoding="utf-8-sig")
    assert ChatTemplate(file=str(path)).source(tokenizer) == CHATML


def test_very_many_keys_are_not_all_listed(tokenizer, tmp_path):
    row = {f"key{number}": number for number in range(10_000)}
    with pytest.raises(UserError, match=r"field `messages` is missing; found key0, .*\(10,000 in all\)") as caught:
        encode(tokenizer, write(tmp_path, [row]), Messages())
    assert len(str(caught.value)) < 1000
    row["messages"] = [user("a"), answer("b")]
    _, counts = encode(tokenizer, write(tmp_path, [row]), Messages())
    assert len(counts.unread) == 51 and sum(counts.unread.values()) == 10_000


def test_what_a_special_token_says_in_a_variable_is_text(tokenizer, tmp_path):
    shown = "{{ tone or '' }}" + CHATML
    row = {"messages": [user("a"), answer("b")], "chat_template_kwargs": {"tone": "<|im_end|>dry"}}
    (sample,), counts = encode(tokenizer, write(tmp_path, [row]), Messages(), shown)
    ids = sample.encoded.input_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2 and not counts.unread
    row["chat_template_kwargs"] = {"messages": []}
    with pytest.raises(UserError, match="own variable `messages`"):
        encode(tokenizer, write(tmp_path, [row]), Messages(), shown)


def test_documents_name_their_other_columns(tmp_path):
    from posttrain.data.documents import DocumentEncoder, Windows

    path = write(tmp_path, [{"text": "a text", "title": "T", "id": 1}])
    counts = Counts()
    encoder = DocumentEncoder(byte_tokenizer(), Windows(64), "error")
    list(encoder.samples(sources.rows(Source(str(path), Text()), tmp_path), counts))
    assert counts.unread == {"title": 1}


def test_unknown_keys_of_trees(tokenizer, tmp_path):
    tree = {"role": "prompter", "text": "q", "lang": "en", "replies": [{"role": "assistant", "text": "a", "mood": "x"}]}
    (sample,), counts = encode(tokenizer, write(tmp_path, [{"prompt": tree}]), Oasst())
    assert runs(tokenizer, sample) == ["a<|im_end|>"] and counts.unread == {"messages.mood": 1}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([("1", None), ("2", "1"), ("2", "1")], r"line 3: field `message_id`: is another message's too"),
        ([("1", None), ("2", "1"), ("3", "4"), ("4", "3")], r"line 3: its parents are its own replies, in a circle"),
        ([("1", None), ("2", "1"), ("3", "5")], r"line 3: its parent 5 is not in the file"),
    ],
)
def test_messages_of_a_flat_tree_are_not_lost(tokenizer, tmp_path, ids, message):
    rows = []
    for number, (own, parent) in enumerate(ids):
        role = ("prompter", "assistant")[number % 2]
        rows.append({"message_id": own, "parent_id": parent, "role": role, "text": f"text {number}"})
    path = write(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        encode(tokenizer, path, Oasst(), CHATML)
    samples, counts = encode(tokenizer, path, Oasst(), CHATML, on_error="skip")
    assert [runs(tokenizer, sample) for sample in samples] == [["text 1<|im_end|>"]]
    assert sum(counts.dropped.values()) == len(rows) - 2


def test_texts_of_parquet_are_read_whatever_their_type(tokenizer, tmp_path):
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        path = tmp_path / "rows.parquet"
        columns = {"instruction": pyarrow.array(["a", "a"], kind), "output": pyarrow.array(["b", "c"], kind)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        samples, _ = encode(tokenizer, path, Alpaca(), CHATML)
        assert [runs(tokenizer, sample) for sample in samples] == [["b<|im_end|>"], ["c<|im_end|>"]]


def test_a_message_that_a_template_rewrites_is_in_the_text(tokenizer, tmp_path):
    """Upper case carries no mark, but another message makes another text."""
    louder = CHATML.replace("message['content'] +", "(message['content'] | upper if loop.first else message.content) +")
    path = write(tmp_path, [{"messages": [user("ab"), answer("c")]}])
    (sample,), counts = encode(tokenizer, path, Messages(), louder)
    assert "AB" in sample.text and not counts.unread


def test_calls_and_tools_as_a_csv_file_has_them(tokenizer, tmp_path):
    row = {"messages": json.dumps(ASKED)}
    (sample,), _ = encode(tokenizer, write(tmp_path, [row]), Messages())
    assert runs(tokenizer, sample) == list(CALL_AND_ANSWER)
