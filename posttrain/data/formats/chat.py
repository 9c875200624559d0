"""Formats with a list of messages per row: OpenAI's and ShareGPT's."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats.fields import ROLE_NAMES, present, role, wrong_type

# Keys of a message for whether it is trained.
_WEIGHTS = ("weight", "loss", "loss_weight", "train")
# Keys that are read into a Message's own fields.
_OWN = {"role", "content", "tool_calls", "function_call", "tool_plan", *_WEIGHTS}


@dataclass
class Messages:
    """OpenAI's chat format: `messages` with `role` and `content`; `tools`.

    A message may have `tool_calls`, and `weight` or `loss`.

    Attributes:
        column: the column of the messages.
        tools: the column of the tool definitions (a list, or a list as JSON text).
        roles: further names of roles, {name: role}.
    """

    column: str = "messages"
    tools: str = "tools"
    roles: Mapping[str, str] = field(default_factory=dict)

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        names = {**ROLE_NAMES, **self.roles}
        messages = []
        for index, item in enumerate(_message_list(row, self.column)):
            messages.append(self._message(item, f"{self.column}[{index}]", names))
        yield Conversation(messages, read_tools(row.get(self.tools), self.tools))

    @staticmethod
    def _message(item: object, where: str, names: Mapping[str, str]) -> Message:
        if not isinstance(item, dict):
            raise wrong_type(where, "an object with role and content", item)
        known_role = role(item.get("role"), f"{where}.role", names)
        calls = _tool_calls(item, where)
        weight = read_weight(item, where)
        if known_role == "function_call":
            return Message("assistant", "", weight, read_calls(content(item, where), where))
        if "content" not in item and calls is None:
            raise RowError(f"field `{where}.content` is missing; found {', '.join(item)}", "no field `content`")
        extra = {key: item[key] for key in item if key not in _OWN and item[key] is not None}
        return Message(known_role, content(item, where), weight, calls, extra)


def _tool_calls(item: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """A message's `tool_calls`, or the older `function_call`."""
    calls = item.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise wrong_type(f"{where}.tool_calls", "a list of calls", calls)
        return calls
    if item.get("function_call"):
        return [{"type": "function", "function": item["function_call"]}]
    return None


@dataclass
class ShareGPT:
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
    tools: str = "tools"
    system: str = "system"
    roles: Mapping[str, str] = field(default_factory=dict)

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        names = {**ROLE_NAMES, **self.roles}
        messages = []
        if row.get(self.system):
            system = content({"content": row[self.system]}, self.system)
            messages.append(Message("system", system))
        for index, item in enumerate(_message_list(row, self.column)):
            where = f"{self.column}[{index}]"
            if not isinstance(item, dict):
                raise wrong_type(where, f"an object with {self.role} and {self.content}", item)
            known_role = role(item.get(self.role), f"{where}.{self.role}", names)
            text = content({"content": present(item, self.content)}, f"{where}.{self.content}")
            weight = read_weight(item, where)
            if known_role == "function_call":
                messages.append(Message("assistant", "", weight, read_calls(text, where)))
            else:
                messages.append(Message(known_role, text, weight))
        yield Conversation(messages, read_tools(row.get(self.tools), self.tools))


def _message_list(row: Mapping[str, Any], column: str) -> list[Any]:
    """A column of messages: a list, or, as a CSV file has it, its JSON text."""
    messages = present(row, column)
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _parse_json(messages, column)
    if not isinstance(messages, list):
        raise wrong_type(column, "a list of messages", messages)
    return messages


def _parse_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"field `{column}`: not valid JSON: {error}", f"field `{column}` is not JSON") from None


def content(item: Mapping[str, Any], where: str) -> str:
    """Return a message's text: a string, null, or a list of text parts."""
    value = item.get("content")
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise wrong_type(f"{where}.content", "text or a list of parts", value)
    return "".join(_part_text(part, where) for part in value)


def _part_text(part: object, where: str) -> str:
    """The text of a part of a message's content: a string or an object of type text."""
    text = part
    kind: object = type(part).__name__
    if isinstance(part, dict):
        kind = part.get("type")
        text = None
        if part.get("type", "text") == "text":
            text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise RowError(
            f"field `{where}.content`: a part of type {kind!r}; only text can be trained on",
            "a part isn't text",
        )
    return text


def read_weight(item: Mapping[str, Any], where: str) -> bool | None:
    """Return whether the message is trained (1, true) or not (0, false); None: it doesn't say."""
    for key in _WEIGHTS:
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(
                f"field `{where}.{key}`: expected 0, 1, true or false, found {value!r}",
                f"`{key}` is not 0 or 1",
            )
        return bool(value)
    return None


def read_calls(text: str, where: str) -> list[dict[str, Any]]:
    """Read tool calls from JSON text: an object with name and arguments, or a list of them."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(
            f"field `{where}`: a function call that is not valid JSON: {error}",
            "a broken function call",
        ) from None
    if not isinstance(calls, list):
        calls = [calls]
    return [_read_call(call, where) for call in calls]


def _read_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            f"field `{where}`: a function call requires `name` and `arguments`",
            "a broken function call",
        )
    arguments = function.get("arguments", {})
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(value: object, name: str) -> list[dict[str, Any]] | None:
    """Read tool definitions, a list or its JSON text.

    Returns:
        Each in the form {"type": "function", "function": ...}; None: there are none.
    """
    if isinstance(value, str):
        value = _parse_json(value, name) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise wrong_type(name, "a list of tool definitions", value)
    tools = []
    for tool in value:
        if "name" in tool and "type" not in tool:
            tool = {"type": "function", "function": tool}
        tools.append(tool)
    return tools
