"""What of a conversation is not in its rendered text, read off the marks that the text carries (see provenance.py).

A whole message, call, tool definition or reasoning that is missing is refused; any other value is named, for the data's
report. Where marks can't show that something is there (a template that rewrites it), it is changed and rendered again:
what changes the text is in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.provenance import TOOLS, Source
from posttrain.data.trace import LONG, REASONING, VARIABLES, holds, is_metadata, is_seen_or_heard, is_spoken, texts

if TYPE_CHECKING:
    from posttrain.data.render import Renderer

Unread = tuple[str, object]  # the name of a field, and its value
LOST_REASONING = (
    "reasoning of trained answers, which the template drops (data.split_turns=reasoning trains each turn with its own, "
    "data.train_on=last the last turn alone)"
)
EMPTY_QUESTION = "a question (the user's message is empty)"
CONTEXT_REASONING = "reasoning of answers that are not trained, which the template drops"


def find_unread(conversation: Conversation, text: str, trained: Sequence[int], renderer: "Renderer") -> list[Unread]:
    """What a conversation's row holds that is neither in the text nor metadata.

    Args:
        conversation: that was rendered.
        text: the result, with its marks.
        trained: indices of the messages that are trained.
        renderer: that rendered it.

    Raises:
        RowError: a whole message, call, tool definition or reasoning is not in it.
    """
    if _all_is_content(conversation, text):
        return []
    return list(_Search(conversation, text, trained, renderer).fields())


def _all_is_content(conversation: Conversation, text: str) -> bool:
    """Whether a conversation is nothing but messages' texts, each shown whole: of most rows, and quickly known."""
    if conversation.tools or conversation.variables or conversation.unread:
        return False
    missing = []
    for message in conversation.messages:
        if message.extra or message.tool_calls or not message.content:
            return False
        missing.append(len(message.content))
    for start, end, source, _ in getattr(text, "spans", ()):
        missing[source.message] -= end - start
    return max(missing) <= 0


class _Search:
    """One conversation beside its text; see `find_unread`."""

    def __init__(self, conversation: Conversation, text: str, trained: Sequence[int], renderer: "Renderer") -> None:
        self.conversation = conversation
        self.text = text
        self.trained = trained
        self.renderer = renderer
        self.sizes: dict[Source, int] = {}  # source -> characters of it that are in the text
        for start, end, source, _ in getattr(text, "spans", ()):
            if end > start:
                self.sizes[source] = self.sizes.get(source, 0) + end - start

    def fields(self) -> Iterator[Unread]:
        conversation = self.conversation
        for index, message in enumerate(conversation.messages):
            if self.sizes.get(Source(index, "content"), 0) < len(message.content):
                yield from self._content(index, message)
            if message.role == "user" and not message.content.strip():
                yield EMPTY_QUESTION, message.content
            if message.tool_calls:
                yield from self._calls(index, message.tool_calls)
            for name, value in message.extra.items():
                if holds(value):
                    yield from self._extra(index, message, name, value)
        if conversation.tools:
            yield from self._tools(conversation.tools)
        for name, value in conversation.variables.items():
            if name not in self.renderer.names:
                yield f"{VARIABLES}.{name}", value
        for name, value in conversation.unread.items():
            yield from self._column(name, value)

    def _content(self, index: int, message: Message) -> Iterator[Unread]:
        """What is missing of a message's text."""
        content = message.content
        if not content.strip() or self.sizes.get(Source(index, "content"), 0) >= len(content.strip()):
            return
        missing = self._missing_parts(index, content)
        if len(missing) == 1 and missing[0].strip() == content.strip():
            if not self._in_other_fields(index, content) and not self._changes_text(index, content=f"{content} x"):
                raise self._lost(index, "this message", f"a {message.role} message", None)
            return
        opened = "".join(missing).replace("<think>", "").replace("</think>", "")
        if not holds(opened):
            return
        if content.count("</think>") == 1 and message.role == "assistant":
            yield LOST_REASONING if index in self.trained else CONTEXT_REASONING, opened.strip()
        else:
            yield "messages.content, a part", opened.strip()

    def _missing_parts(self, index: int, content: str) -> list[str]:
        """The parts of a message's text that no mark shows, in order."""
        shown = []
        for start, end, source, origin in getattr(self.text, "spans", ()):
            if source == (index, "content", ()) and end > start:
                shown.append((origin, origin + end - start))
        parts = []
        at = 0
        for start, end in sorted(shown):
            if start > at:
                parts.append(content[at:start])
            at = max(at, end)
        parts.append(content[at:])
        return [part for part in parts if part.strip()]

    def _in_other_fields(self, index: int, content: str) -> bool:
        """Whether a message's text is put together from fields that the template writes by themselves."""
        written = ""
        for start, end, source, _ in getattr(self.text, "spans", ()):
            if source.message == index and source.field != "content":
                written += str.__getitem__(self.text, slice(start, end)) + "\n"
        return bool(written) and all(line.strip() in written for line in content.splitlines())

    def _changes_text(self, index: int, **changes: Any) -> bool:
        """Whether the text is another one when a message is."""
        messages = list(self.conversation.messages)
        messages[index] = replace(messages[index], **changes)
        try:
            changed = self.renderer.render(replace(self.conversation, messages=messages))
        except RowError:
            return False
        return not self.text.startswith(str.__str__(changed))

    def _calls(self, index: int, calls: list[dict[str, Any]]) -> Iterator[Unread]:
        shown = self._paths(index, "tool_calls")
        for number, call in enumerate(calls):
            if not _any_within(shown, (number,)):
                raise self._lost(index, f"its tool call {number + 1} of {len(calls)}", "tool calls", "tool_calls")
            arguments = call.get("function", {}).get("arguments")
            if holds(arguments) and not _any_within(shown, (number, "function", "arguments")):
                without = list(calls)
                without[number] = {**call, "function": {**call["function"], "arguments": {}}}
                if not self._changes_text(index, tool_calls=without):
                    raise self._lost(index, f"the arguments of its tool call {number + 1}", "arguments", "tool_calls")
            yield from self._leaves(call, (number,), shown, "messages.tool_calls")

    def _tools(self, tools: list[dict[str, Any]]) -> Iterator[Unread]:
        shown = self._paths(TOOLS, "tools")
        for number, tool in enumerate(tools):
            if not _any_within(shown, (number,)):
                raise RowError(
                    f"the template {self.renderer.template.name} leaves out the tool definitions; use template=chatml, "
                    "or leave them out yourself with data.format.tools=null and data.format.metadata=[tools]",
                    "the template leaves out the tool definitions",
                )
            yield from self._leaves(tool, (number,), shown, "tools")

    def _extra(self, index: int, message: Message, name: str, value: object) -> Iterator[Unread]:
        """What is missing of a message's further keys."""
        if is_metadata(name):
            return
        if name in self.renderer.names:
            shown = self._paths(index, name)
            if shown:
                yield from self._leaves(value, (), shown, f"messages.{name}")
                return
            if isinstance(value, bool | int | float):  # leaves no mark
                return
            if not isinstance(value, str):
                others = {key: item for key, item in message.extra.items() if key != name}
                if self._changes_text(index, extra=others):
                    return
        if all(part in message.content for part in texts(value)) and holds(list(texts(value))):
            return
        if name == REASONING[0]:
            if not self.renderer.writes_reasoning:
                raise self._lost(index, "its reasoning", "reasoning", name)
            yield LOST_REASONING if index in self.trained else CONTEXT_REASONING, value
        elif is_spoken(name) and not self._in_text(value):
            raise self._lost(index, f"its `{name}`", f"`{name}`", name)
        else:
            yield f"messages.{name}", value

    def _column(self, name: str, value: object) -> Iterator[Unread]:
        """A column that the format didn't read, unless the text has what is in it."""
        if self._in_text(value):
            return
        if is_seen_or_heard(name):
            raise RowError(
                f"field `{name}`: a picture, sound or film, and only text can be trained on; leave the row out, or say "
                f"with data.format.metadata=[{name}] that what is said doesn't need it",
                f"field `{name}` is not text",
            )
        if is_spoken(name):
            raise RowError(
                f"field `{name}`: holds what is said, and is not read; name it in the options of data.format (a system "
                f"prompt as system, definitions as tools), or leave it out with data.format.metadata=[{name}]",
                f"field `{name}` is not read",
            )
        yield name, value

    def _leaves(
        self, value: object, path: tuple[str | int, ...], shown: set[tuple[str | int, ...]], name: str
    ) -> Iterator[Unread]:
        """The texts within a value, at `path` of its field, that neither marks nor the text show."""
        if path in shown:
            return
        if isinstance(value, str):
            if value.strip() and value.strip() not in self.text:
                yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                if not is_metadata(key):
                    inner = name if name.endswith(("arguments", "properties")) else f"{name}.{key}"
                    yield from self._leaves(item, (*path, key), shown, inner)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from self._leaves(item, (*path, number), shown, name)

    def _paths(self, message: int, field: str) -> set[tuple[str | int, ...]]:
        """Where in a field the texts and containers are that the text shows."""
        return {source.path for source in self.sizes if source.message == message and source.field == field}

    def _in_text(self, value: object) -> bool:
        """Whether all texts of a value are in the conversation's: long ones anywhere, short ones as whole messages."""
        contents = {message.content.strip() for message in self.conversation.messages}
        parts = list(texts(value))
        return bool(parts) and all(part in contents or (len(part) >= LONG and part in self.text) for part in parts)

    def _lost(self, index: int, what: str, kind: str, key: str | None) -> RowError:
        """The error of a part of a message that the template leaves out, under a key; None: of all of it."""
        message = self.conversation.messages[index]
        role = message.role
        hint = f"choose another template=, or leave it out yourself with data.format.metadata=[{key}]"
        if key is None:
            known = {"developer": "system"}.get(role, "user")
            hint = f"data.format.roles={{{role}: {known}}}, or another role that it knows, writes it as that"
        return RowError(
            f"messages[{index}] ({role}): the template {self.renderer.template.name} leaves out {what}; {hint}",
            f"the template leaves out {kind}",
        )


def _any_within(shown: set[tuple[str | int, ...]], path: tuple[str | int, ...]) -> bool:
    """Whether a shown path is within `path`, or `path` within it."""
    return any(one[: len(path)] == path[: len(one)] for one in shown)
