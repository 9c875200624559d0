"""Formats with a list of messages per row: OpenAI's and ShareGPT's."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats.fields import ROLE_NAMES, FormatOptions, listed, parse_json, present, role, wrong_type
from posttrain.data.trace import REASONING, UNKNOWN_WEIGHTS, WEIGHTS, holds
from posttrain.utils.mappings import without_none

# Keys of a message that are read into a Message's own fields, besides those of its role and text.
_OWN = frozenset(("tool_calls", "function_call", *WEIGHTS))
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
PYTHON_NOTATION = (
    "messages in Python's notation, as pandas writes a list into CSV; write JSON Lines instead: "
    'DataFrame.to_json(path, orient="records", lines=True)'
)
# Keys of a part of a message's text, and its types: Chat Completions', and those of the Responses API.
_PART = ("type", "text", "value")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Spellings of a call's arguments: OpenAI's, Llama's, LangChain's and Anthropic's.
_ARGUMENTS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True)
class Keys:
    """How a file spells its messages.

    Attributes:
        role, content: a message's keys of the role and of the text.
        roles: further names of roles, {name: role}.
        metadata: keys of messages that are not read.
    """

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)
    metadata: Collection[str] = ()

    def leaves_out(self, key: str) -> bool:
        """Whether a key of messages is not read; the first name of reasoning stands for all of its spellings."""
        return key in self.metadata or (key in REASONING and REASONING[0] in self.metadata)


@dataclass
class Messages(FormatOptions):
    """OpenAI's chat format: `messages` with `role` and `content`; `tools`; `system`.

    A message may have `tool_calls`, reasoning, and `weight`, `train` or `training`.

    Attributes:
        column: the column of the messages.
        tools: the column of the tool definitions (a list, or a list as JSON text).
        roles: further names of roles, {name: role}.
        system: the column of a system prompt.
    """

    column: str = "messages"
    tools: str | None = "tools"
    roles: Mapping[str, str] = field(default_factory=dict)
    system: str | None = "system"

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        keys = Keys(roles=self.roles, metadata=self.metadata)
        messages = read_messages(present(row, self.column, "column"), self.column, keys)
        yield with_system_and_tools(row, messages, self.system, self.tools)


@dataclass
class ShareGPT(FormatOptions):
    """`conversations` with `from` and `value`; `system`; `tools`.

    Function calls and observations are messages.

    Attributes:
        column: the column of the messages.
        role: a message's key of the role.
        content: a message's key of the text.
        tools: the column of the tool definitions (a list, or a list as JSON text).
        system: the column of the system prompt.
        roles: further names of roles, {name: role}.
    """

    column: str = "conversations"
    role: str = "from"
    content: str = "value"
    tools: str | None = "tools"
    system: str | None = "system"
    roles: Mapping[str, str] = field(default_factory=dict)

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        keys = Keys(self.role, self.content, self.roles, self.metadata)
        messages = read_messages(present(row, self.column, "column"), self.column, keys)
        yield with_system_and_tools(row, messages, self.system, self.tools)


def with_system_and_tools(
    row: Mapping[str, Any], messages: list[Message], system: str | None, tools: str | None
) -> Conversation:
    """Return the conversation of some messages and the columns beside them.

    Args:
        row: the row.
        messages: of it.
        system, tools: columns of the system prompt and of the tool definitions; None: there is no such column.
    """
    if system and holds(row.get(system)):
        prompt = content(row[system], system, {})
        said_already = messages and messages[0].role == "system" and messages[0].content.strip() == prompt.strip()
        if not said_already:
            messages.insert(0, Message("system", prompt))
    return Conversation(messages, read_tools(row.get(tools), tools) if tools else None)


def is_text_of_messages(value: object) -> bool:
    """Whether a column of texts, as CSV files have, holds a list of messages in JSON or Python's notation."""
    return isinstance(value, str) and _MESSAGES.match(value) is not None


def is_python_notation(value: object) -> bool:
    """Whether a text of messages is what Python prints of them, which isn't JSON."""
    beginning = _MESSAGES.match(value) if isinstance(value, str) else None
    return beginning is not None and beginning[1] == "'"


def read_messages(items: object, column: str, keys: Keys) -> list[Message]:
    """Read a column of messages: a list, or, as a CSV file has it, its JSON text."""
    if is_python_notation(items):
        raise RowError(f"field `{column}`: {PYTHON_NOTATION}", f"field `{column}` is not JSON")
    if isinstance(items, str) and items.lstrip().startswith("["):
        items = parse_json(items, column)
    if not isinstance(items, list):
        raise wrong_type(column, "a list of messages", items)
    names = {**ROLE_NAMES, **keys.roles}
    return [_message(item, f"{column}[{index}]", keys, names) for index, item in enumerate(items)]


def _message(item: object, where: str, keys: Keys, names: Mapping[str, str]) -> Message:
    """A message; what is not its role, text, calls or weight is in its `extra`, for templates that know it."""
    if not isinstance(item, dict):
        raise wrong_type(where, f"an object with {keys.role} and {keys.content}", item)
    if keys.role not in item:
        name = f"{where}.{keys.role}"
        raise RowError(
            f"field `{name}` is missing; found {listed(item)}: data=sharegpt reads `from` and `value`, data=messages "
            "`role` and `content`, data=custom any two",
            f"no field `{keys.role}`",
        )
    known_role = role(item.get(keys.role), f"{where}.{keys.role}", names)
    weight = read_weight(item, where, keys.metadata)
    extra: dict[str, Any] = {}
    for key, value in item.items():
        if key == keys.role or key == keys.content or key in _OWN or value is None or keys.leaves_out(key):
            continue
        beside = key in ("role", "content")  # in a file that spells them otherwise
        extra[f"{key} of the file" if beside else key] = value
    _name_reasoning(extra, where)
    text = content(item.get(keys.content), f"{where}.{keys.content}", extra)
    if known_role == "function_call":
        return Message("assistant", "", weight, read_calls(text, where), extra)
    calls = None
    if "tool_calls" not in keys.metadata:
        calls = _tool_calls(item, where)
    if keys.content not in item and calls is None and REASONING[0] not in extra:
        name = f"{where}.{keys.content}"
        raise RowError(f"field `{name}` is missing; found {listed(item)}", f"no field `{keys.content}`")
    return Message(known_role, text, weight, calls, extra)


def _name_reasoning(extra: dict[str, Any], where: str) -> None:
    """Give an answer's reasoning its first name of `REASONING`, whatever the file calls it; parts become one text."""
    for name in REASONING:
        if isinstance(extra.get(name), list):
            extra[name] = content(extra[name], f"{where}.{name}", extra)
    for name in REASONING[1:]:
        if not isinstance(extra.get(name), str):
            continue
        if not holds(extra.get(REASONING[0])):
            extra[REASONING[0]] = extra.pop(name)
        elif extra[name] == extra[REASONING[0]]:
            del extra[name]


def _tool_calls(item: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """A message's `tool_calls`, or the older `function_call`."""
    calls = item.get("tool_calls")
    if isinstance(calls, str) and calls.strip():  # as a CSV file has them
        calls = parse_json(calls, f"{where}.tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise wrong_type(f"{where}.tool_calls", "a list of calls", calls)
        calls = [_read_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if not holds(item.get("function_call")):
        return calls or None
    older = _read_call({"function": item["function_call"]}, f"{where}.function_call")
    if calls and [call["function"] for call in calls] != [older["function"]]:
        raise RowError(f"field `{where}`: function_call and tool_calls contradict each other", "calls contradict")
    return calls or [older]


def content(value: object, name: str, extra: dict[str, Any]) -> str:
    """Return a message's text.

    Args:
        value: a string, null, or a list of text parts.
        name: of the field, for errors.
        extra: what parts hold besides their text is added to it.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise wrong_type(name, "text or a list of parts", value)
    if sum(isinstance(part, str) for part in value) > 1:
        raise RowError(
            f"field `{name}`: a list of several texts, between which nothing is said to stand; write one text, data as "
            "JSON text",
            "a list of texts",
        )
    return "".join([_part_text(part, name, extra) for part in value])


def _part_text(part: object, name: str, extra: dict[str, Any]) -> str:
    """The text of a part of a message's content: a string, or an object of type text or with nothing but a text."""
    text = part
    kind: object = type(part).__name__
    if isinstance(part, dict):
        kind = part.get("type")
        others = {key: value for key, value in part.items() if key not in _PART and value is not None}
        text = None
        if kind in _TEXT_PARTS or (kind is None and not others):
            text = part.get("text", part.get("value"))
            extra.update({f"content.{key}": value for key, value in others.items()})
    if not isinstance(text, str):
        raise RowError(
            f"field `{name}`: a part of type {kind!r}; only text can be trained on, and data as JSON text",
            "a part isn't text",
        )
    return text


def read_weight(item: Mapping[str, Any], where: str, metadata: Collection[str] = ()) -> bool | None:
    """Return whether the message is trained (1, true) or not (0, false); None: it doesn't say.

    Args:
        item: the message.
        where: its place, for errors.
        metadata: keys that are not read.
    """
    for key in UNKNOWN_WEIGHTS:
        if key not in metadata and holds(item.get(key)):
            raise RowError(
                f"field `{where}.{key}`: isn't known here, and programs differ in what it means; use a `weight` of 0 "
                "or 1 for a whole message",
                f"`{key}` is not known",
            )
    found: dict[str, bool] = {}
    for key in WEIGHTS:
        value = item.get(key)
        if value is None or key in metadata:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(
                f"field `{where}.{key}`: expected 0, 1, true or false, found {value!r}",
                f"`{key}` is not 0 or 1",
            )
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise RowError(f"field `{where}`: {' and '.join(found)} contradict each other", "keys of training contradict")
    return next(iter(found.values()), None)


def read_calls(text: str, where: str) -> list[dict[str, Any]]:
    """Read tool calls from JSON text: an object with name and arguments, or a list of them."""
    try:
        calls = parse_json(text, where)
    except RowError as error:
        reason = error.reason.replace("not valid JSON", "a function call that is not valid JSON")
        raise RowError(reason, "a broken function call") from None
    if not isinstance(calls, list):
        calls = [calls]
    return [_read_call(call, where) for call in calls]


def _read_call(call: object, where: str) -> dict[str, Any]:
    """A call as templates read it: `function` with name and arguments beside the call's other keys."""
    if isinstance(call, str):
        call = parse_json(call, where)
    inside = isinstance(call, dict) and isinstance(call.get("function"), dict)
    function: Any = call
    if isinstance(call, dict) and inside:
        function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            f"field `{where}`: a function call requires `name` and `arguments`",
            "a broken function call",
        )
    spelled = next((key for key in _ARGUMENTS if key in function), _ARGUMENTS[0])
    arguments = _read_arguments(function.get(spelled), f"{where}.{spelled}")
    if isinstance(call, dict) and inside:
        function = {_ARGUMENTS[0] if key == spelled else key: value for key, value in function.items()}
        function[_ARGUMENTS[0]] = arguments
        return {"type": "function", **call, "function": function}
    others = {key: value for key, value in function.items() if key not in ("name", spelled, "type")}
    return {"type": "function", "function": {"name": function["name"], _ARGUMENTS[0]: arguments}, **others}


def _read_arguments(value: object, where: str) -> dict[str, Any] | str:
    """The arguments of a call: an object, or the JSON text of one; null and blank text are none."""
    if not holds(value) and not isinstance(value, dict):
        return {}
    parsed = value
    if isinstance(value, str):
        try:
            parsed = parse_json(value, where)
        except RowError as error:
            raise RowError(error.reason, "a call's arguments are not JSON") from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise RowError(
            f"field `{where}`: expected an object, or its JSON text, found {type(parsed).__name__}",
            "a call's arguments are no object",
        )
    return value if isinstance(value, str) else parsed


def read_tools(value: object, name: str) -> list[dict[str, Any]] | None:
    """Read tool definitions, a list or its JSON text; each may be JSON text as well.

    Returns:
        Each in the form {"type": "function", "function": ...}; None: there are none.
    """
    if isinstance(value, str):
        value = parse_json(value, name) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise wrong_type(name, "a list of tool definitions", value)
    return [_read_tool(tool, f"{name}[{index}]") for index, tool in enumerate(value)]


def _read_tool(tool: object, name: str) -> dict[str, Any]:
    """A tool's definition; one that is not within `function` yet is put there."""
    if isinstance(tool, str):
        tool = parse_json(tool, name)
    if not isinstance(tool, dict):
        raise wrong_type(name, "a tool's definition", tool)
    definition = without_none(tool)
    if "function" in definition or "name" not in definition or definition.get("type", "function") != "function":
        return definition
    function = {key: value for key, value in definition.items() if key != "type"}
    return {"type": "function", "function": function}
