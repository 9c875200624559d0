"""Rows of every format, their real quirks included, to conversations; and what is said about the wrong ones."""

import pytest

from posttrain.data import sources
from posttrain.data.conversation import RowError
from posttrain.data.formats import Alpaca, Custom, Dolly, Messages, Oasst, PromptCompletion, ShareGPT
from posttrain.data.readers import Place
from posttrain.data.sources import Source
from posttrain.errors import UserError


def said(form, row):
    """[(role, content)] of the one conversation of a row."""
    (found,) = form.conversations(row)
    return [(message.role, message.content) for message in found.messages]


def test_alpaca():
    assert said(Alpaca(), {"instruction": "do", "input": "", "output": "done"}) == [
        ("user", "do"),
        ("assistant", "done"),
    ]
    assert said(Alpaca(), {"instruction": "do", "input": None, "output": "done"})[0] == ("user", "do")
    (found,) = Alpaca().conversations({"instruction": "do", "input": "this", "output": "done", "system": "be"})
    assert [m.content for m in found.messages] == ["be", "do\n\nthis", "done"]
    assert found.messages[1].extra == {"instruction": "do", "input": "this"}
    history = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert [text for _, text in said(Alpaca(), history)] == ["a", "b", "c", "d"]


def test_alpaca_instances_are_a_conversation_each():
    row = {"instruction": "do", "instances": [{"input": "", "output": "1"}, {"input": "x", "output": "2"}]}
    assert [found.messages[-1].content for found in Alpaca().conversations(row)] == ["1", "2"]


def test_dolly():
    row = {"instruction": "do", "context": "with", "response": "done", "category": "qa"}
    assert said(Dolly(), row) == [("user", "do\n\nwith"), ("assistant", "done")]


def test_prompt_completion():
    form = PromptCompletion("question", "answer")
    assert said(form, {"question": "a", "answer": "b"}) == [("user", "a"), ("assistant", "b")]
    chat = {"prompt": [{"role": "assistant", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}
    (found,) = PromptCompletion().conversations(chat)
    assert [message.train for message in found.messages] == [False, None]


def test_messages_with_parts_weights_and_roles_in_any_spelling():
    row = {
        "messages": [
            {
                "role": "Human",
                "content": [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}],
                "loss_weight": 0.0,
            },
            {"role": "Assistant", "content": "c", "loss": True},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                "weight": 0,
            },
        ],
        "tools": '[{"name": "f"}]',
    }
    (found,) = Messages().conversations(row)
    assert [(m.role, m.content, m.train) for m in found.messages] == [
        ("user", "ab", False),
        ("assistant", "c", True),
        ("assistant", "", False),
    ]
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]


def test_messages_as_json_text():
    text = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    assert said(Messages(), {"messages": text}) == [("user", "a"), ("assistant", "b")]


def test_sharegpt_with_calls_and_observations():
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": "[]",
        "system": "be",
    }
    (found,) = ShareGPT().conversations(row)
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2].tool_calls == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert found.tools is None


TREE = {
    "prompt": {
        "role": "prompter",
        "text": "q",
        "replies": [
            {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
            {
                "role": "assistant",
                "text": "best",
                "rank": 0,
                "replies": [{"role": "prompter", "text": "more", "rank": None, "replies": []}],
            },
            {"role": "assistant", "text": "unranked", "rank": None, "replies": []},
            {"role": "assistant", "text": "gone", "rank": -1, "deleted": True, "replies": []},
        ],
    }
}
FLAT = [
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q", "rank": None},
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "worse", "rank": 1.0},
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "best", "rank": 0.0},
    {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "more", "rank": None},
    {"message_id": "5", "parent_id": "1", "role": "assistant", "text": "unranked", "rank": None},
]


@pytest.mark.parametrize("rows", [[TREE], FLAT], ids=["tree", "flat"])
@pytest.mark.parametrize(("branches", "answers"), [("best", ["best"]), ("all", ["worse", "best", "unranked"])])
def test_oasst(rows, branches, answers):
    placed = [(Place("f", i, f"line {i}"), row) for i, row in enumerate(rows)]
    found = [conversation for _, conversation in Oasst(branches).read(placed)]
    assert sorted([m.content for m in conversation.messages] for conversation in found) == [
        ["q", answer] for answer in sorted(answers)
    ]


def test_custom_columns_and_patterns():
    row = {"meta": {"title": "T"}, "q": "a", "n": 3, "reply": "b"}
    form = Custom(prompt="{meta.title}: {q} ({n})", answer="reply", system="meta.title")
    assert said(form, row) == [("system", "T"), ("user", "T: a (3)"), ("assistant", "b")]


def test_custom_messages_and_roles():
    form = Custom(messages="chat.turns", role="who", content="text", roles={"Kundin": "user", "Bot": "assistant"})
    row = {"chat": {"turns": [{"who": "Kundin", "text": "a"}, {"who": "Bot", "text": "b"}]}}
    assert said(form, row) == [("user", "a"), ("assistant", "b")]


def test_custom_function():
    def turns(row):
        return [{"role": "user", "content": row["x"]}, {"role": "assistant", "content": row["x"][::-1]}]

    assert said(Custom(function=turns), {"x": "ab"}) == [("user", "ab"), ("assistant", "ba")]
    with pytest.raises(RowError, match="raised KeyError"):
        said(Custom(function=turns), {"y": "ab"})
    with pytest.raises(UserError, match="either prompt and answer"):
        Custom()


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        (Alpaca(), {"instruction": "x", "input": "y"}, "field `output` is missing; found instruction, input"),
        (Alpaca(), {"instruction": 3, "output": "y"}, "field `instruction`: expected text, found int"),
        (Alpaca(), {"instruction": "x", "instances": "y"}, "field `instances`: expected a list, found str"),
        (Dolly(), {"instruction": "x", "response": None}, "field `response`: expected text, found null"),
        (Messages(), {"messages": "x"}, "expected a list of messages, found str"),
        (
            Messages(),
            {"messages": [{"role": "narrator", "content": "x"}]},
            r"messages\[0\].role.*unknown role 'narrator'",
        ),
        (Messages(), {"messages": [{"content": "x"}]}, r"messages\[0\].role. is missing; found content"),
        (Messages(), {"messages": [{"role": "user"}]}, r"messages\[0\].content. is missing"),
        (Messages(), {"messages": [{"role": "user", "content": 7}]}, "expected text or a list of parts, found int"),
        (Messages(), {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        (
            Messages(),
            {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
            "expected 0, 1, true or false",
        ),
        (ShareGPT(), {"conversations": [{"from": "function_call", "value": "{"}]}, "not valid JSON"),
        (ShareGPT(), {"conversations": [{"from": "gpt", "value": "x"}], "tools": "["}, "field `tools`: not valid JSON"),
        (Custom(prompt="{a.b}", answer="c"), {"a": {}, "c": "x"}, "field `b` is missing"),
        (Custom(prompt="a", answer="c"), {"a": [1], "c": "x"}, "expected text or a number, found list"),
    ],
)
def test_wrong_rows(form, row, reason):
    with pytest.raises(RowError, match=reason):
        list(form.conversations(row))


def test_wrong_trees():
    broken = [{"prompt": "x"}, {"message_id": "9", "parent_id": "8", "role": "assistant", "text": "x"}]
    found = list(Oasst().read([(Place("f", i, f"line {i}"), row) for i, row in enumerate(broken)]))
    assert ["first message" in str(found[0][1]), "not in the file" in str(found[1][1])] == [True, True]


def test_rows_and_errors_keep_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    (_, good), (place, bad) = sources.rows(Source(str(path), Alpaca()), tmp_path)
    assert good.messages[1].content == "b" and isinstance(bad, RowError) and place.name == "line 2"
