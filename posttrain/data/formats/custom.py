"""Any other file: its columns and roles set in YAML, or a function of the user's."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.conversation import Conversation, RowError
from posttrain.data.formats.chat import Keys, Messages, read_messages, read_tools, with_system_and_tools
from posttrain.data.formats.columns import pair
from posttrain.data.formats.fields import FormatOptions, present
from posttrain.errors import UserError


@dataclass
class Custom(FormatOptions):
    """A mapping of columns: `prompt` and `answer`, or `messages`, or `function`; a.b is b within a.

    Attributes:
        prompt: the column of the question; or a text with columns in braces, "{title}: {question}".
        answer: the column of the answer; or such a text.
        system: the column of the system prompt; or such a text.
        messages: the column of a list of messages.
        role: a message's key of the role.
        content: a message's key of the text.
        tools: the column of the tool definitions.
        roles: the file's names of roles, {name: role}.
        function: called with a row, returns a list of {"role", "content"} or
            {"messages": [...], "tools": [...]}.
    """

    prompt: str | None = None
    answer: str | None = None
    system: str | None = None
    messages: str | None = None
    role: str = "role"
    content: str = "content"
    tools: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    function: Callable[[Mapping[str, Any]], Any] | None = None

    def __post_init__(self) -> None:
        with_pair = self.prompt is not None or self.answer is not None
        with_messages = self.messages is not None
        with_function = self.function is not None
        if with_pair + with_messages + with_function != 1:
            raise UserError("data.format: give either prompt and answer, or messages, or function")
        if with_pair and (self.prompt is None or self.answer is None):
            raise UserError("data.format: prompt and answer are required together")
        if with_function and not callable(self.function):
            raise UserError("data.format.function: must be a function; give it with _target_ and _partial_: true")

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        if self.function is not None:
            yield from self._called(row, self.function)
        elif self.messages is not None:
            yield from self._of_messages(row, self.messages)
        else:
            assert self.prompt is not None and self.answer is not None
            system = _filled(row, self.system) if self.system else ""
            conversation = pair(_filled(row, self.prompt), _filled(row, self.answer), system)
            if self.tools:
                conversation.tools = read_tools(_at(row, self.tools), self.tools)
            yield conversation

    def _of_messages(self, row: Mapping[str, Any], column: str) -> Iterator[Conversation]:
        keys = Keys(self.role, self.content, self.roles, self.metadata)
        messages = read_messages(_at(row, column), column, keys)
        columns = {}
        if self.system:
            columns["system"] = _filled(row, self.system)
        if self.tools:
            columns["tools"] = _at(row, self.tools)
        yield with_system_and_tools(columns, messages, "system", "tools")

    def _called(self, row: Mapping[str, Any], function: Callable[[Mapping[str, Any]], Any]) -> Iterator[Conversation]:
        try:
            result = function(row)
        except Exception as error:  # whatever the user's code raises is about this row
            raise RowError(
                f"data.format.function raised {type(error).__name__}: {error}",
                "data.format.function",
            ) from error
        if not isinstance(result, dict):
            result = {"messages": result}
        present(result, "messages")
        yield from Messages(roles=self.roles, metadata=self.metadata).conversations(result)


def _at(row: Mapping[str, Any], path: str) -> Any:
    """The value at `path`: a column, or columns within columns joined by dots."""
    if path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    if not dot:
        return present(row, path)
    inside = present(row, head)
    if not isinstance(inside, dict):
        raise RowError(f"field `{head}`: expected an object with `{rest}`", f"field `{head}` is not an object")
    return _at(inside, rest)


def _filled(row: Mapping[str, Any], pattern: str) -> str:
    """The text of a column, or a pattern with its columns filled in.

    Null is empty, numbers are written out.
    """
    if "{" not in pattern:
        return _written(_at(row, pattern), pattern)
    text = ""
    rest = pattern
    while rest:
        before, brace, rest = rest.partition("{")
        text += before
        if brace:
            name, _, rest = rest.partition("}")
            text += _written(_at(row, name), name)
    return text


def _written(value: object, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float | bool):
        return str(value)
    raise RowError(
        f"field `{name}`: expected text or a number, found {type(value).__name__}",
        f"field `{name}` is not text",
    )
