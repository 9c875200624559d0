"""Reading one field of a row with an error that says what was expected."""

from collections.abc import Mapping
from typing import Any

from posttrain.data.conversation import ROLES, RowError

# What people call the roles; anything else needs a mapping of its own.
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
    """The value of a field that must be there."""
    if name not in row:
        raise RowError(f"field `{name}` is missing; found {', '.join(map(str, row)) or 'none'}", f"no field `{name}`")
    return row[name]


def text(row: Mapping[str, Any], name: str, optional: bool = False) -> str:
    """A text field; an optional one that is missing or null is empty."""
    value = row.get(name) if optional else present(row, name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise wrong_type(name, "text", value)
    return value


def wrong_type(name: str, expected: str, value: Any) -> RowError:
    """The error for a field of another type."""
    found = "null" if value is None else type(value).__name__
    return RowError(
        f"field `{name}`: expected {expected}, found {found}", f"field `{name.split('[')[0]}` is not {expected}"
    )


def role(value: Any, name: str, names: Mapping[str, str]) -> str:
    """The role that a file's word for it means."""
    if not isinstance(value, str):
        raise wrong_type(name, "a role", value)
    known = names.get(value) or names.get(value.strip().lower())
    if known is None:
        raise RowError(
            f"field `{name}`: unknown role {value!r}; known are {', '.join(sorted(set(names)))}. "
            "data.format.roles={'your word': role} teaches another, role being one of " + ", ".join(ROLES),
            f"unknown role {value[:40]!r}",
        )
    return known
