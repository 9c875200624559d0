"""Formats that hold a list of messages per row: OpenAI's and ShareGPT's."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats.fields import ROLE_NAMES, present, role, wrong_type

# Ways to say in a message whether it is trained, and the keys that are read into a Message's own fields.
_WEIGHTS = ("weight", "loss", "loss_weight", "train")
_OWN = {"role", "content", "tool_calls", "function_call", "tool_plan", *_WEIGHTS}


@dataclass
class Messages:
    """OpenAI's chat format: `messages` of `role` and `content`; `tools`; a message's `tool_calls`, `weight` or `loss`.

    Attributes:
        column: the column of the messages.
        tools: the column of the tool definitions (a list, or a list as JSON text).
        roles: further words for roles, {word: role}.
    """

    column: str = "messages"
    tools: str = "tools"
    roles: Mapping[str, str] = field(default_factory=dict)

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        given = _list(row, self.column)
        names = {**ROLE_NAMES, **self.roles}
        messages = [self._message(item, f"{self.column}[{i}]", names) for i, item in enumerate(given)]
        yield Conversation(messages, read_tools(row.get(self.tools), self.tools))

    @staticmethod
    def _message(item: Any, where: str, names: Mapping[str, str]) -> Message:
        if not isinstance(item, dict):
            raise wrong_type(where, "an object with role and content", item)
        who = role(item.get("role"), f"{where}.role", names)
        calls = item.get("tool_calls") or None
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise wrong_type(f"{where}.tool_calls", "a list of calls", calls)
        if calls is None and item.get("function_call"):
            calls = [{"type": "function", "function": item["function_call"]}]
        if who == "function_call":
            return Message("assistant", "", read_weight(item, where), read_calls(content(item, where), where))
        if "content" not in item and calls is None:
            raise RowError(f"field `{where}.content` is missing; found {', '.join(item)}", "no field `content`")
        extra = {key: value for key, value in item.items() if key not in _OWN and value is not None}
        return Message(who, content(item, where), read_weight(item, where), calls, extra)


@dataclass
class ShareGPT:
    """`conversations` with `from` and `value`; `system`; `tools`; function calls and observations as messages.

    Attributes:
        column: the column of the messages.
        role: a message's key of the role.
        content: a message's key of the text.
        tools: the column of the tool definitions (a list, or a list as JSON text).
        system: the column of the system prompt.
        roles: further words for roles, {word: role}.
    """

    column: str = "conversations"
    role: str = "from"
    content: str = "value"
    tools: str = "tools"
    system: str = "system"
    roles: Mapping[str, str] = field(default_factory=dict)

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        given = _list(row, self.column)
        names = {**ROLE_NAMES, **self.roles}
        messages = []
        if row.get(self.system):
            messages.append(Message("system", content({"content": row[self.system]}, self.system)))
        for i, item in enumerate(given):
            where = f"{self.column}[{i}]"
            if not isinstance(item, dict):
                raise wrong_type(where, f"an object with {self.role} and {self.content}", item)
            who = role(item.get(self.role), f"{where}.{self.role}", names)
            said = content({"content": present(item, self.content)}, f"{where}.{self.content}")
            weight = read_weight(item, where)
            if who == "function_call":
                messages.append(Message("assistant", "", weight, read_calls(said, where)))
            else:
                messages.append(Message(who, said, weight))
        yield Conversation(messages, read_tools(row.get(self.tools), self.tools))


def _list(row: Mapping[str, Any], column: str) -> list:
    """A column of messages: a list, or as a CSV file holds it, its JSON text."""
    given = present(row, column)
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise RowError(f"field `{column}`: not valid JSON: {error}", f"field `{column}` is not JSON") from None
    if not isinstance(given, list):
        raise wrong_type(column, "a list of messages", given)
    return given


def content(item: Mapping[str, Any], where: str) -> str:
    """A message's text: a string, null, or a list of text parts."""
    value = item.get("content")
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise wrong_type(f"{where}.content", "text or a list of parts", value)
    texts = []
    for part in value:
        said = part if isinstance(part, str) else None
        if isinstance(part, dict) and part.get("type", "text") == "text":
            said = part.get("text", part.get("value"))
        if not isinstance(said, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(
                f"field `{where}.content`: a part of type {kind!r}; only text can be trained on", "a part isn't text"
            )
        texts.append(said)
    return "".join(texts)


def read_weight(item: Mapping[str, Any], where: str) -> bool | None:
    """Whether the message says that it is trained (1, true) or isn't (0, false); None if it says nothing."""
    for key in _WEIGHTS:
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(
                f"field `{where}.{key}`: expected 0, 1, true or false, found {value!r}", f"`{key}` is not 0 or 1"
            )
        return bool(value)
    return None


def read_calls(said: str, where: str) -> list[dict[str, Any]]:
    """Tool calls written as JSON text: an object with name and arguments, or a list of them."""
    try:
        calls = json.loads(said)
    except json.JSONDecodeError as error:
        raise RowError(
            f"field `{where}`: a function call that is not valid JSON: {error}", "a broken function call"
        ) from None
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"field `{where}`: a function call needs `name` and `arguments`", "a broken function call")
        found.append(
            {"type": "function", "function": {"name": function["name"], "arguments": function.get("arguments", {})}}
        )
    return found


def read_tools(value: Any, name: str) -> list[dict[str, Any]] | None:
    """Tool definitions, a list or its JSON text, each in the form {"type": "function", "function": ...}."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"field `{name}`: not valid JSON: {error}", f"field `{name}` is not JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise wrong_type(name, "a list of tool definitions", value)
    return [{"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool for tool in value]
