"""Formats with one question and one answer per row, in columns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats.chat import Keys, is_text_of_messages, read_messages, read_tools, with_system_and_tools
from posttrain.data.formats.fields import FormatOptions, present, text, wrong_type
from posttrain.data.trace import TracedRow


def pair(prompt: str, answer: str, system: str = "") -> Conversation:
    """Return a conversation of one exchange; an empty system prompt is none."""
    messages = [Message("user", prompt), Message("assistant", answer)]
    if system:
        messages.insert(0, Message("system", system))
    return Conversation(messages)


def with_context(instruction: str, context: str, answer: str, system: str = "") -> Conversation:
    """Return a conversation of one exchange about an instruction with a context.

    The user message is the instruction and, after an empty line, its context. The two are in the
    message's `extra` as well, for a template that writes them under headings of their own.
    """
    if not context.strip():
        return pair(instruction, answer, system)
    conversation = pair(f"{instruction}\n\n{context}", answer, system)
    conversation.messages[-2].extra = {"instruction": instruction, "input": context}
    return conversation


@dataclass
class Alpaca(FormatOptions):
    """`instruction`, `input` (may be missing or empty), `output`; or `instances`, a list of input and output.

    `system` and `history` (a list of [question, answer]) are read where a row has them. The user
    message is the instruction and, after an empty line, the input.
    """

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        instruction = text(row, "instruction")
        if "instances" in row and "output" not in row:
            instances = row["instances"]
            if not isinstance(instances, list):
                raise wrong_type("instances", "a list", instances)
            if not instances:
                raise RowError("field `instances`: is empty", "no instances")
            for index, instance in enumerate(instances):
                if not isinstance(instance, dict):
                    raise wrong_type(f"instances[{index}]", "an object", instance)
                fields = TracedRow(instance)
                conversation = self._conversation(row, instruction, fields)
                unread = fields.unread(self.metadata)
                conversation.unread = {f"instances.{name}": value for name, value in unread.items()}
                yield conversation
        else:
            yield self._conversation(row, instruction, row)

    @staticmethod
    def _conversation(row: Mapping[str, Any], instruction: str, fields: Mapping[str, Any]) -> Conversation:
        context = text(fields, "input", optional=True)
        system = text(row, "system", optional=True)
        conversation = with_context(instruction, context, text(fields, "output"), system)
        history = row.get("history") or []
        if not isinstance(history, list):
            raise wrong_type("history", "a list of [question, answer]", history)
        earlier = []
        for turn in history:
            match turn:
                case [str(question), str(answer)]:
                    earlier += [Message("user", question), Message("assistant", answer)]
                case _:
                    raise RowError("field `history`: expected a list of [question, answer]", "field `history`")
        conversation.messages[-2:-2] = earlier
        return conversation


@dataclass
class Dolly(FormatOptions):
    """`instruction`, `context` (may be empty), `response`."""

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        context = text(row, "context", optional=True)
        yield with_context(text(row, "instruction"), context, text(row, "response"))


@dataclass
class PromptCompletion(FormatOptions):
    """A question and an answer in two columns, each text or a list of chat messages.

    Attributes:
        prompt: the column of the question.
        completion: the column of the answer.
        system: the column of the system prompt. None: there is none.
        tools: the column of the tool definitions (a list, or a list as JSON text).
        roles: further names of roles in lists of messages, {name: role}.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    system: str | None = None
    tools: str | None = "tools"
    roles: Mapping[str, str] = field(default_factory=dict)

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        prompt, completion = present(row, self.prompt, "prompt"), row.get(self.completion)
        if isinstance(prompt, list) or (is_text_of_messages(prompt) and is_text_of_messages(completion)):
            yield self._of_messages(row, prompt)
            return
        system = text(row, self.system, optional=True) if self.system else ""
        conversation = pair(text(row, self.prompt), text(row, self.completion, option="completion"), system)
        if self.tools:
            conversation.tools = read_tools(row.get(self.tools), self.tools)
        yield conversation

    def _of_messages(self, row: Mapping[str, Any], prompt: object) -> Conversation:
        """A conversation of which the prompt is not trained."""
        completion = present(row, self.completion, "completion")
        if not isinstance(completion, list) and not is_text_of_messages(completion):
            expected = "a list of messages, as the prompt is"
            raise wrong_type(self.completion, expected, completion)
        keys = Keys(roles=self.roles, metadata=self.metadata)
        messages = read_messages(prompt, self.prompt, keys)
        for message in messages:
            message.train = False
        answers = read_messages(completion, self.completion, keys)
        if messages and _said(answers[: len(messages)]) == _said(messages):
            raise RowError(
                f"field `{self.completion}`: begins with the messages of `{self.prompt}`, which would be said twice; "
                f"data=messages data.format.column={self.completion} reads it as the whole conversation",
                "a prompt that the completion repeats",
            )
        messages += answers
        return with_system_and_tools(row, messages, self.system, self.tools)


def _said(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]
