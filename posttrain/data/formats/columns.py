"""Formats with one question and one answer per row, in columns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats.fields import present, text, wrong_type


def pair(prompt: str, answer: str, system: str = "") -> Conversation:
    """A conversation of one exchange; an empty system prompt is none."""
    messages = [Message("user", prompt), Message("assistant", answer)]
    return Conversation([Message("system", system), *messages] if system else messages)


def instructed(instruction: str, context: str, answer: str, system: str = "") -> Conversation:
    """A conversation of one exchange whose user message is the instruction and, after an empty line, its context.

    The two are in the message's `extra` as well, for a template that writes them under headings of their own.
    """
    if not context.strip():
        return pair(instruction, answer, system)
    found = pair(f"{instruction}\n\n{context}", answer, system)
    found.messages[-2].extra = {"instruction": instruction, "input": context}
    return found


@dataclass
class Alpaca:
    """`instruction`, `input` (may be missing or empty), `output`; or `instances`, a list of input and output.

    `system` and `history` (a list of [question, answer]) are read where a row has them. The chat message of the user
    is the instruction, and after an empty line the input.
    """

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        instruction = text(row, "instruction")
        if "instances" in row and "output" not in row:
            instances = row["instances"]
            if not isinstance(instances, list):
                raise wrong_type("instances", "a list", instances)
            for index, instance in enumerate(instances):
                if not isinstance(instance, dict):
                    raise wrong_type(f"instances[{index}]", "an object", instance)
                yield self._one(row, instruction, instance)
        else:
            yield self._one(row, instruction, row)

    @staticmethod
    def _one(row: Mapping[str, Any], instruction: str, fields: Mapping[str, Any]) -> Conversation:
        context, system = text(fields, "input", optional=True), text(row, "system", optional=True)
        found = instructed(instruction, context, text(fields, "output"), system)
        history = row.get("history") or []
        if not isinstance(history, list):
            raise wrong_type("history", "a list of [question, answer]", history)
        earlier = []
        for turn in history:
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn)):
                raise RowError("field `history`: expected a list of [question, answer]", "field `history`")
            earlier += [Message("user", turn[0]), Message("assistant", turn[1])]
        found.messages[-2:-2] = earlier
        return found


@dataclass
class Dolly:
    """`instruction`, `context` (may be empty), `response`."""

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        yield instructed(text(row, "instruction"), text(row, "context", optional=True), text(row, "response"))


@dataclass
class PromptCompletion:
    """A question and an answer in two columns, each text or a list of chat messages.

    Attributes:
        prompt: the column of the question.
        completion: the column of the answer.
        system: the column of the system prompt. None: there is none.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    system: str | None = None

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        if isinstance(present(row, self.prompt), list):
            from posttrain.data.formats.chat import Messages

            completion = present(row, self.completion)
            if not isinstance(completion, list):
                raise wrong_type(self.completion, "a list of messages, as the prompt is", completion)
            (found,) = Messages().conversations({**row, "messages": row[self.prompt] + completion})
            for message in found.messages[: len(row[self.prompt])]:
                message.train = False
            yield found
        else:
            system = text(row, self.system, optional=True) if self.system else ""
            yield pair(text(row, self.prompt), text(row, self.completion), system)
