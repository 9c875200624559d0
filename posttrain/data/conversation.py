"""What every file format is turned into: a typed list of messages, with the tools they may call; or a document."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(Exception):
    """One row can't be used. Stops the run with the file and the row, or is counted (`data.on_error=skip`).

    Args:
        reason: what is wrong and what was expected, naming the field.
        kind: a few words without row-specific text, under which skipped rows are counted.
    """

    def __init__(self, reason: str, kind: str | None = None):
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or reason


@dataclass(slots=True)
class Message:
    """One turn.

    Args:
        role: one of `ROLES`.
        content: the text; empty where an assistant message only calls tools.
        train: True or False where the row says so itself (`weight`, `train`); None leaves it to `data.train_on`.
        tool_calls: calls as the chat templates read them: `{"type": "function", "function": {"name", "arguments"}}`;
            the arguments are an object, or the JSON text of one.
        extra: further keys a chat template may read (`reasoning_content`, `name`, `tool_call_id`, ...).
    """

    role: str
    content: str
    train: bool | None = None
    tool_calls: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """The message as the dict that chat templates read."""
        message = {"role": self.role, "content": self.content, **self.extra}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


@dataclass(slots=True)
class Conversation:
    """Messages in order, and the tool definitions (JSON schemas) they were made with.

    Args:
        messages: in order.
        tools: their definitions; None: there are none.
        variables: the row's own variables of the chat template, e.g. {enable_thinking: false}.
        unread: columns of the row that the format did not read, and that are not metadata.
        tree: a number that all conversations of a tree have, which a split keeps together; None: it is by itself.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, Any] = field(default_factory=dict)
    tree: int | None = None


@dataclass(slots=True)
class Document:
    """A text that is trained as a whole, from its first character to its end.

    Args:
        text: all of it.
        unread: columns of the row besides, that are not metadata.
    """

    text: str
    unread: Mapping[str, Any] = field(default_factory=dict)
