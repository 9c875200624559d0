"""Kinds of rows, and what is done with each: the cases of test_rows.py, and the table of docs/rows.md.

`python tests/data/row_cases.py` prints the table. What is right is Transformers' own rendering of the same messages in
the form that it documents, or the rule that is written beside the case.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiny_tokenizer import CHATML

from posttrain.data.formats import Alpaca, Custom, Messages, PromptCompletion, ShareGPT
from posttrain.data.presence import LOST_REASONING

# Tools, calls, their results, and reasoning, which is dropped before the last question.
FULL = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role in ('system', 'user') %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<result>' + m.content + '</result><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
    {%- set content, thought = m.content or '', '' %}
    {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > last.user and (thought or enable_thinking is defined and not enable_thinking) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<call>' + call.function.name + ' ' }}{{ call.function.arguments | tojson }}{{- '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# The arguments of a call are added as a text, not encoded.
TEXT_ARGUMENTS = FULL.replace(" ' }}{{ call.function.arguments | tojson", " ' + call.function.arguments")
FIRST_CALL_ONLY = FULL.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
# The system prompt is said with the last question, and only there.
SYSTEM_WITH_LAST = """{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}
{%- else %}{% set system, rest = '', messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}{{ '[Q]' + (system if loop.last else '') + m.content + '[A]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
# No header before an answer, and another text before one that follows a tool's result.
BARE_CALLS = """{% for m in messages %}{% if m.role == 'user' %}{{ '[Q]' + m.content + '[/Q]' }}
{%- elif m.tool_calls %}[CALLS]{{ m.tool_calls[0].function | tojson }}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '[R]' + m.content + ' of ' + m.tool_call_id + '[/R]' }}{% endif %}{% endfor %}"""
# A turn ends with the marker of the next message.
NEXT_MARKER = (
    "{% for m in messages %}{{ ('<|endoftext|>' if m.role == 'user' else '<|im_start|>') + m.content }}{% endfor %}"
)


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: object, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


RESULT = {"role": "tool", "content": "sun"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
ASKED = [user("Weather in Bern?"), answer("", tool_calls=[call({"city": "Bern"})]), RESULT, answer("Sunny.")]
CALL_AND_ANSWER = ('<call>weather {"city": "Bern"}</call><|im_end|>', "Sunny.<|im_end|>")
THOUGHT = "<think>\nsmall sum\n</think>\n\n4<|im_end|>"


@dataclass(frozen=True)
class Case:
    """One kind of row.

    Attributes:
        kind, done: the line of the table.
        row: of the file.
        format: that reads it.
        template: Jinja.
        reference: the messages, tools and variables that Transformers renders to the same tokens; None: not compared.
        trained: the text of each trained run.
        refused: what the error of a row says; empty: the row is trained.
        unread: fields that the report names.
    """

    kind: str
    done: str
    row: Mapping[str, Any]
    format: Any = field(default_factory=Messages)
    template: str = FULL
    reference: Mapping[str, Any] | None = None
    trained: Sequence[str] = ()
    refused: str = ""
    unread: Sequence[str] = ()
    train_on: str = "assistant"
    options: Mapping[str, Any] = field(default_factory=dict)


def asked(arguments: object, **more: Any) -> dict[str, Any]:
    """The conversation with a call of some arguments."""
    return {"messages": [ASKED[0], answer(None, tool_calls=[call(arguments)]), *ASKED[2:]], **more}


SUM = {"messages": [user("2+2?"), answer("4", reasoning_content="small sum")]}
SUMS = [user("2+2?"), answer("4", reasoning_content="small sum"), user("3+3?"), answer("6", reasoning_content="three")]
RHYME = {"messages": [{"role": "developer", "content": "Rhyme."}, user("2+2?"), answer("Four, no more.")]}
FLAT_TOOL = {"name": "weather", "description": "of a city", "parameters": {}}

CASES = {
    "arguments as text": Case(
        "a call's `arguments` as JSON text, as OpenAI has it; a template that encodes them",
        "decoded, so that they are encoded once",
        asked('{"city": "Bern"}'),
        reference={"messages": ASKED},
        trained=CALL_AND_ANSWER,
    ),
    "arguments as an object": Case(
        "`arguments` as an object; a template that adds them as a text",
        "encoded, as Transformers documents for such templates",
        asked({"city": "Bern"}),
        template=TEXT_ARGUMENTS,
        reference=asked('{"city": "Bern"}'),
        trained=CALL_AND_ANSWER,
    ),
    "empty arguments": Case(
        "`arguments` that are empty or null",
        "`{}`",
        asked(""),
        reference=asked({}),
        trained=("<call>weather {}</call><|im_end|>", "Sunny.<|im_end|>"),
    ),
    "broken arguments": Case(
        "`arguments` that are no JSON object", "refused", asked('{"city": '), refused=r"tool_calls\[0\].arguments.*JSON"
    ),
    "arguments that lose something": Case(
        "`arguments` as JSON text that has a key twice, or NaN",
        "refused",
        asked('{"city": "Bern", "city": "Basel"}'),
        refused=r"tool_calls\[0\].arguments.*the key 'city' is there twice",
    ),
    "arguments with NaN": Case("", "", asked('{"degrees": NaN}'), refused=r"arguments.*NaN is not a value of JSON"),
    "list arguments": Case("", "", asked("[1]"), refused="expected an object, or its JSON text, found list"),
    "flat call": Case(
        "a call that is `{name, arguments}` by itself, or spells its arguments `parameters`, `args` or `input`",
        "read as a function call",
        {"messages": [ASKED[0], answer("", tool_calls=[{"name": "weather", "args": {"city": "Bern"}}]), *ASKED[2:]]},
        reference={"messages": ASKED},
        trained=CALL_AND_ANSWER,
    ),
    "two calls": Case(
        "`tool_calls` and the older `function_call` in one message",
        "the same: read once; others: refused",
        {"messages": [ASKED[0], {**answer("", tool_calls=[call({})]), "function_call": {"name": "time"}}]},
        refused=r"field `messages\[1\]`: function_call and tool_calls contradict each other",
    ),
    "the same call twice": Case(
        "",
        "",
        {
            "messages": [
                ASKED[0],
                {**ASKED[1], "function_call": {"name": "weather", "arguments": {"city": "Bern"}}},
                *ASKED[2:],
            ]
        },
        reference={"messages": ASKED},
        trained=CALL_AND_ANSWER,
    ),
    "second call": Case(
        "a call that the template doesn't write",
        "refused",
        {"messages": [ASKED[0], answer("", tool_calls=[call({}), call({}, "time")]), RESULT, answer("x")]},
        template=FIRST_CALL_ONLY,
        refused=r"messages\[1\] \(assistant\): the template .* leaves out its tool call 2 of 2",
    ),
    "text beside a call": Case(
        "the text of an answer that calls a tool, which the template doesn't write",
        "refused",
        {"messages": [user("Weather?"), answer("Let me look.", tool_calls=[call({"x": 1})]), RESULT, answer("Sunny.")]},
        template=BARE_CALLS.replace("+ ' of ' + m.tool_call_id", ""),
        refused=r"messages\[1\] \(assistant\): the template .* leaves out this message",
    ),
    "tools as texts": Case(
        "tool definitions as JSON text, one by one or as a list; without `function` around them",
        "read",
        {"messages": ASKED, "tools": ['{"name": "weather", "description": "of a city", "parameters": {}}']},
        reference={"messages": ASKED, "tools": [TOOL]},
        trained=CALL_AND_ANSWER,
    ),
    "lost tools": Case(
        "tool definitions that the template doesn't write",
        "refused",
        {"messages": [user("a"), answer("b")], "tools": [FLAT_TOOL]},
        template=CHATML,
        refused="leaves out the tool definitions",
    ),
    "tools beside a pair": Case(
        "tool definitions, a system prompt, reasoning, or anything else that is said, in a column that the format "
        "doesn't read",
        "refused; `data.format.metadata` names columns to be left out",
        {"query": "Weather?", "tools": "[]", "functions": [FLAT_TOOL], "answers": "Sunny."},
        Custom(prompt="query", answer="answers"),
        refused="field `functions`: holds what is said, and is not read",
    ),
    "tools under a further name": Case(
        "",
        "",
        {"messages": [user("a"), answer("b")], "tool_defs": [FLAT_TOOL]},
        refused="field `tool_defs`: holds what is said, and is not read",
    ),
    "pictures beside messages": Case(
        "a picture, sound or film beside the text, in a column or as a part of a message",
        "refused",
        {"messages": [user("<image>What is it?"), answer("A cat.")], "images": ["cat.png"]},
        refused="field `images`: a picture, sound or film, and only text can be trained on",
    ),
    "tools of a message": Case(
        "a message's own `tools`, `tool_call` and the like, whose names the template has for something else",
        "refused",
        {"messages": [{"role": "system", "content": "Be brief.", "tools": [FLAT_TOOL]}, user("a"), answer("b")]},
        refused=r"messages\[0\] \(system\): the template .* leaves out its `tools`",
    ),
    "call of a message": Case(
        "",
        "",
        {"messages": [user("a"), answer("b", tool_call={"name": "weather", "arguments": {}})]},
        template=FULL.replace("for call in", "for tool_call in").replace("call.function", "tool_call.function"),
        refused=r"messages\[1\] \(assistant\): the template .* leaves out its `tool_call`",
    ),
    "a key that only decides": Case(
        "",
        "",
        {"messages": [user("a", flags={"loud": 1}), answer("b")]},
        template=FULL.replace("m.content + '<|im_end|>", "m.content + ('!' if m.flags else '') + '<|im_end|>"),
        reference={"messages": [user("a", flags={"loud": 1}), answer("b")]},
        trained=("b<|im_end|>",),
    ),
    "left out on purpose": Case(
        "",
        "",
        {"query": "Weather?", "functions": [FLAT_TOOL], "answers": "Sunny."},
        Custom(prompt="query", answer="answers", metadata=["functions"]),
        reference={"messages": [user("Weather?"), answer("Sunny.")]},
        trained=("Sunny.<|im_end|>",),
    ),
    "unknown column": Case(
        "any other column that isn't read, such as a category",
        "counted and named in the report, with an example; not an `id`, `name`, date or the like, nor where the text "
        "has it",
        {"messages": [user("a"), answer("b")], "mood": "gloomy", "prompt": "a", "id": 7, "created_at": "today"},
        reference={"messages": [user("a"), answer("b")]},
        trained=("b<|im_end|>",),
        unread=("mood",),
    ),
    "unknown role": Case(
        "a message whose role the template doesn't know",
        "refused; `data.format.roles={developer: system}` has it written as another role's",
        RHYME,
        refused=r"messages\[0\] \(developer\): the template .* leaves out this message; data.format.roles",
    ),
    "mapped role": Case(
        "",
        "",
        RHYME,
        Messages(roles={"developer": "system"}),
        reference={"messages": [{"role": "system", "content": "Rhyme."}, *RHYME["messages"][1:]]},
        trained=("Four, no more.<|im_end|>",),
    ),
    "system prompt with the last question": Case(
        "a message, of whatever role, that the template leaves out of this conversation",
        "refused",
        {"messages": [{"role": "system", "content": "In French."}, user("weather?"), answer("Soleil.")]},
        template=SYSTEM_WITH_LAST,
        refused=r"messages\[0\] \(system\): the template .* leaves out this message",
    ),
    "system column": Case(
        "a `system` column beside the messages",
        "read (`data.format.system`)",
        {"messages": [user("a"), answer("b")], "system": "Be brief."},
        reference={"messages": [{"role": "system", "content": "Be brief."}, user("a"), answer("b")]},
        trained=("b<|im_end|>",),
    ),
    "custom messages": Case(
        "messages under other names (`data=custom`, `data=sharegpt`) with calls and reasoning",
        "the same as with `data=messages`",
        {"talk": {"turns": [*ASKED[:3], answer("Sunny.", reasoning_content="small sum")]}},
        Custom(messages="talk.turns"),
        reference={"messages": [*ASKED[:3], answer("Sunny.", reasoning_content="small sum")]},
        trained=(CALL_AND_ANSWER[0], "<think>\nsmall sum\n</think>\n\nSunny.<|im_end|>"),
    ),
    "custom, beside what is read": Case(
        "",
        "",
        {"talk": {"turns": [user("a"), answer("b")], "system_prompt": "Be brief."}},
        Custom(messages="talk.turns"),
        refused="field `talk.system_prompt`: holds what is said",
    ),
    "reasoning": Case(
        "reasoning as `reasoning_content`, `reasoning` or `thinking`",
        "given to the template under the name that it reads; trained with its tags",
        {"messages": [user("2+2?"), answer("4", reasoning="small sum")]},
        reference=SUM,
        trained=(THOUGHT,),
    ),
    "reasoning of ShareGPT": Case(
        "",
        "",
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "thinking": "small sum"}]},
        ShareGPT(),
        reference=SUM,
        trained=(THOUGHT,),
    ),
    "reasoning in parts": Case(
        "",
        "",
        {"messages": [user("2+2?"), answer("4", reasoning=[{"type": "text", "text": "small sum"}])]},
        reference=SUM,
        trained=(THOUGHT,),
    ),
    "reasoning without a place": Case(
        "reasoning, and a template that has no place for it",
        "refused",
        SUM,
        template=CHATML,
        refused=r"messages\[1\] \(assistant\): the template .* leaves out its reasoning",
    ),
    "reasoning, not wanted": Case(
        "",
        "",
        {"messages": [user("2+2?"), answer("4", reasoning="small sum")]},
        Messages(metadata=["reasoning_content"]),
        template=CHATML,
        reference={"messages": [user("2+2?"), answer("4")]},
        trained=("4<|im_end|>",),
    ),
    "reasoning of earlier turns": Case(
        "reasoning of answers before the last question, which the template drops",
        "counted: their answers are trained bare, unless `data.split_turns=reasoning` gives each turn a conversation "
        "of its own, or `data.train_on=last`",
        {"messages": SUMS},
        reference={"messages": SUMS},
        trained=("4<|im_end|>", "<think>\nthree\n</think>\n\n6<|im_end|>"),
        unread=(LOST_REASONING,),
    ),
    "closing tag alone": Case(
        "a text with the closing tag of its reasoning, with or without the opening one",
        "one mask: the opening tag that the template writes is trained",
        {"messages": [user("2+2?"), answer("small sum\n</think>\n\n4")]},
        reference=SUM,
        trained=(THOUGHT,),
    ),
    "thinking twice": Case(
        "a text with two closing tags of reasoning, of which the template keeps a part",
        "counted and named in the report",
        {"messages": [user("a"), answer("<think>one</think>and<think>two</think>b")]},
        reference={"messages": [user("a"), answer("<think>one</think>and<think>two</think>b")]},
        trained=("<think>\none\n</think>\n\nb<|im_end|>",),
        unread=("messages.content, a part",),
    ),
    "refusal": Case(
        "an answer in `refusal` instead of `content`",
        "refused",
        {"messages": [user("a"), answer(None, refusal="I can't."), user("b"), answer("c")]},
        refused=r"messages\[1\] \(assistant\): the template .* leaves out its `refusal`",
    ),
    "empty answer": Case(
        "an empty answer with an `id`, a `name`, or `refusal: null`",
        "never trained: only text, a call or reasoning makes an answer",
        {"messages": [user("a"), answer("", id="m1", refusal=None), user("b"), answer("c", id="m2")]},
        reference={"messages": [user("a"), answer(""), user("b"), answer("c")]},
        trained=("c<|im_end|>",),
    ),
    "empty question": Case(
        "a user's message without text",
        "counted: its answer is trained without a question",
        {"messages": [user(None), answer("b")]},
        reference={"messages": [user(""), answer("b")]},
        trained=("b<|im_end|>",),
        unread=("a question (the user's message is empty)",),
    ),
    "parts of text": Case(
        "content in parts of type `text`, `input_text` or `output_text`",
        "joined as they are",
        {"messages": [user([{"type": "input_text", "text": "a"}, {"text": "b"}]), answer(["c"])]},
        reference={"messages": [user("ab"), answer("c")]},
        trained=("c<|im_end|>",),
    ),
    "list of texts": Case(
        "content that is a list of several texts, or of objects that are no parts of text",
        "refused",
        {"messages": [*ASKED[:2], {"role": "tool", "content": ["sun", "wind"]}, answer("Sunny.")]},
        refused=r"field `messages\[2\].content`: a list of several texts",
    ),
    "list of data": Case(
        "",
        "",
        {"messages": [*ASKED[:2], {"role": "tool", "content": [{"name": "Bern", "value": "sun"}]}, answer("Sunny.")]},
        refused=r"field `messages\[2\].content`: a part of type None",
    ),
    "unknown key": Case(
        "any other key of a message that the template doesn't write",
        "counted and named in the report",
        {"messages": [user("a", mood="gloomy"), answer("b", annotations=[{"type": "x", "url": "y"}])]},
        reference={"messages": [user("a"), answer("b")]},
        trained=("b<|im_end|>",),
        unread=("messages.mood", "messages.annotations"),
    ),
    "training: false": Case(
        "`weight`, `loss`, `loss_mask`, `train`, `training` or `trainable` of a message: 0, 1, false or true",
        "the message is trained or not; two that contradict each other, other numbers and what programs read in "
        "several ways (`train_detail`, `mask`, `masked`, `loss_scale`) are refused",
        {"messages": [user("a"), answer("bad", training=False), user("b"), answer("good")]},
        reference={"messages": [user("a"), answer("bad"), user("b"), answer("good")]},
        trained=("good<|im_end|>",),
    ),
    "half a weight": Case(
        "",
        "",
        {"messages": [user("a"), answer("b", weight=0.5)]},
        refused=r"field `messages\[1\].weight`: expected 0, 1, true or false, found 0.5",
    ),
    "contradiction": Case(
        "", "", {"messages": [user("a"), answer("b", weight=1, train=False)]}, refused="weight and train contradict"
    ),
    "train_detail": Case(
        "",
        "",
        {"messages": [user("a"), answer("b", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]},
        refused=r"messages\[1\].train_detail",
    ),
    "loss mask": Case(
        "",
        "",
        {"messages": [user("a"), answer("bad", loss_mask=0), user("b"), answer("good", loss_mask=1)]},
        reference={"messages": [user("a"), answer("bad"), user("b"), answer("good")]},
        trained=("good<|im_end|>",),
    ),
    "masked": Case(
        "", "", {"messages": [user("a"), answer("b", masked=True)]}, refused=r"messages\[1\].masked`: isn't known here"
    ),
    "masked, and nothing is meant": Case(
        "",
        "",
        {"messages": [user("a"), answer("b", masked=True)]},
        Messages(metadata=["masked"]),
        reference={"messages": [user("a"), answer("b")]},
        trained=("b<|im_end|>",),
    ),
    "a bad answer": Case(
        "`label: false`, as KTO's data has it",
        "refused",
        {"prompt": "a", "completion": "bad", "label": False},
        PromptCompletion(),
        refused="field `label`: false says that this answer is a bad one",
    ),
    "weight of a row": Case(
        "a `weight` or `train` of a whole row that is not 1",
        "refused: what a row counts is a weight of `data.sources`",
        {"instruction": "a", "output": "b", "weight": 0.5},
        Alpaca(),
        refused="field `weight`: 0.5 of a whole row has no effect",
    ),
    "variables": Case(
        "`chat_template_kwargs` of a row, as TRL documents it",
        "given to the template; one that it doesn't read is named in the report",
        {
            "prompt": [user("2+2?")],
            "completion": [answer("4")],
            "chat_template_kwargs": {"enable_thinking": False, "tone": "dry"},
        },
        PromptCompletion(),
        reference={"messages": [user("2+2?"), answer("4")], "enable_thinking": False},
        trained=("4<|im_end|>",),
        unread=("chat_template_kwargs.tone",),
    ),
    "messages as texts": Case(
        "`prompt` and `completion` that are lists of messages as JSON text, as a CSV file has them",
        "read as messages",
        {"prompt": '[{"role": "user", "content": "a"}]', "completion": '[{"role": "assistant", "content": "b"}]'},
        PromptCompletion(),
        reference={"messages": [user("a"), answer("b")]},
        trained=("b<|im_end|>",),
    ),
    "messages in Python's notation": Case(
        "",
        "",
        {"prompt": "[{'role': 'user', 'content': 'a'}]", "completion": "[{'role': 'assistant', 'content': 'b'}]"},
        PromptCompletion(),
        refused="field `prompt`: messages in Python's notation",
    ),
    "repeated prompt": Case(
        "a `completion` that begins with the messages of the `prompt`",
        "refused: they would be said twice",
        {"prompt": [user("a")], "completion": [user("a"), answer("b")]},
        PromptCompletion(),
        refused="field `completion`: begins with the messages of `prompt`",
    ),
    "other spelling": Case(
        "messages of `role` and `content` where `from` and `value` are expected, or the other way round",
        "refused, with the format that reads them",
        {"conversations": [user("a"), answer("b")]},
        ShareGPT(),
        refused=r"field `conversations\[0\].from` is missing; found role, content: data=sharegpt reads",
    ),
    "several steps": Case(
        "several calls in a row, and a template without a header before them",
        "each trained from its own marker to its end token",
        {
            "messages": [
                user("w?"),
                answer("", tool_calls=[call({"x": 1})]),
                {**RESULT, "tool_call_id": "c1"},
                answer("", tool_calls=[call({"x": 2})]),
                {**RESULT, "tool_call_id": "c2"},
                answer("Mixed."),
            ]
        },
        template=BARE_CALLS,
        trained=(
            '[CALLS]{"name": "weather", "arguments": {"x": 1}}<|im_end|>',
            '[CALLS]{"name": "weather", "arguments": {"x": 2}}<|im_end|>',
            "Mixed.<|im_end|>",
        ),
    ),
    "next message's marker": Case(
        "a template that ends a turn by the next message's marker, named in `template.stop_tokens`",
        "the marker is trained after the last answer too",
        {"messages": [user("a"), answer("one"), user("b"), answer("two")]},
        template=NEXT_MARKER,
        trained=("one<|endoftext|>", "two<|endoftext|>"),
        options={"stop_tokens": ["<|endoftext|>"]},
    ),
    "alpaca with an input": Case(
        "an instruction with an input, and a template that writes them under headings or as one text",
        "neither is reported: the text has both",
        {"instruction": "Add", "input": "2 and 2", "output": "4"},
        Alpaca(),
        reference={"messages": [user("Add\n\n2 and 2"), answer("4")]},
        trained=("4<|im_end|>",),
    ),
    "no instances": Case(
        "`instances` that are empty",
        "refused",
        {"instruction": "Add", "instances": []},
        Alpaca(),
        refused="field `instances`: is empty",
    ),
    "instances": Case(
        "a key of one of `instances` that isn't read",
        "counted and named in the report",
        {"instruction": "Add", "instances": [{"input": "2 and 2", "output": "4", "comment": "easy"}]},
        Alpaca(),
        reference={"messages": [user("Add\n\n2 and 2"), answer("4")]},
        trained=("4<|im_end|>",),
        unread=("instances.comment",),
    ),
}


def table() -> str:
    """The lines of the table, as Markdown."""
    lines = ["| a row with | what is done |", "|---|---|"]
    for case in CASES.values():
        if case.kind:
            lines.append(f"| {case.kind} | {case.done} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
