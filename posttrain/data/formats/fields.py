"""Read one field of a row, with errors that say what was expected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.conversation import ROLES, RowError
from posttrain.data.json_text import TEXTS
from posttrain.data.trace import VARIABLES
from posttrain.utils.mappings import without_none

MOST_NAMED = 20  # keys of a row that an error lists

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


@dataclass(kw_only=True)
class FormatOptions:
    """What every format has.

    Attributes:
        metadata: columns, and keys of messages, that are not part of what is said: never read, and not reported.
    """

    metadata: Sequence[str] = ()


def present(row: Mapping[str, Any], name: str, option: str | None = None) -> Any:
    """Return the value of a required field.

    Args:
        row: that has it.
        name: the field's.
        option: of the format, which gives it another name; None: there is none.
    """
    if name not in row:
        reason = f"field `{name}` is missing; found {listed(row)}"
        if option is not None:
            reason += f"; data.format.{option} says which one it is"
        raise RowError(reason, f"no field `{name}`")
    return row[name]


def listed(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, the first ones of very many."""
    names = [str(name)[:100] for name in row]
    if len(names) > MOST_NAMED:
        names[MOST_NAMED:] = [f"... ({len(names):,} in all)"]
    return ", ".join(names) or "none"


def parse_json(text: str, name: str) -> Any:
    """Return what the JSON text in a field means."""
    try:
        return TEXTS.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"field `{name}`: not valid JSON: {error}", f"field `{name}` is not JSON") from None


def variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's own variables of the chat template, an object or its JSON text; nulls are none."""
    value = row.get(VARIABLES)
    if isinstance(value, str) and value.strip():
        value = parse_json(value, VARIABLES)
    if not value:
        return {}
    if not isinstance(value, dict):
        raise wrong_type(VARIABLES, "an object", value)
    return without_none(value)


def text(row: Mapping[str, Any], name: str, optional: bool = False, option: str | None = None) -> str:
    """Return a text field; an optional one that is missing or null is empty. For the arguments see `present`."""
    if optional and row.get(name) is None:
        return ""
    value = present(row, name, option)
    if not isinstance(value, str):
        raise wrong_type(name, "text", value)
    return value


def wrong_type(name: str, expected: str, value: object) -> RowError:
    """Return the error for a field of the wrong type."""
    actual = type(value).__name__
    if value is None:
        actual = "null"
    elif isinstance(value, dict):  # one that is traced as well
        actual = "dict"
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
