"""Read one field of a row, with errors that say what was expected."""

from collections.abc import Mapping
from typing import Any

from posttrain.data.conversation import ROLES, RowError

# Common names of the roles; any other name requires a mapping of its own.
ROLE_NAMES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "instruction": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool_calls": "function_call",
}


def present(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a required field."""
    if name not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise RowError(f"field `{name}` is missing; found {fields}", f"no field `{name}`")
    return row[name]


def text(row: Mapping[str, Any], name: str, optional: bool = False) -> str:
    """Return a text field; an optional one that is missing or null is empty."""
    if optional and row.get(name) is None:
        return ""
    value = present(row, name)
    if not isinstance(value, str):
        raise wrong_type(name, "text", value)
    return value


def wrong_type(name: str, expected: str, value: object) -> RowError:
    """Return the error for a field of the wrong type."""
    actual = "null" if value is None else type(value).__name__
    column = name.split("[")[0]
    return RowError(
        f"field `{name}`: expected {expected}, found {actual}",
        f"field `{column}` is not {expected}",
    )


def role(value: object, name: str, names: Mapping[str, str]) -> str:
    """Return the role that a file's name for it means."""
    if not isinstance(value, str):
        raise wrong_type(name, "a role", value)
    known = names.get(value) or names.get(value.strip().lower())
    if known is None:
        raise RowError(
            f"field `{name}`: unknown role {value!r}; known are {', '.join(sorted(set(names)))}. "
            f"data.format.roles={{'your name': role}} adds one, for a role of {', '.join(ROLES)}",
            f"unknown role {value[:40]!r}",
        )
    return known
