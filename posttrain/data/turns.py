"""Conversations in whole turns: a question, and all that is said until the next one."""

from collections.abc import Iterator
from dataclasses import replace

from posttrain.data.conversation import Conversation


def shorter(conversation: Conversation, truncation_side: str) -> list[Conversation]:
    """The conversations made of fewer whole turns, shortest first.

    Args:
        conversation: to cut.
        truncation_side: right: the last turns go, and each result ends with an answer; left: the first ones, but not
            the system prompt, and each begins with a question.
    """
    messages = conversation.messages
    if truncation_side == "right":
        parts = []
        for end in range(1, len(messages)):
            if messages[end - 1].role == "assistant" and messages[end].role != "tool":
                parts.append(replace(conversation, messages=messages[:end]))
        return parts
    first = 0  # message after the system prompt; 0 too where there is nothing else
    while first < len(messages) and messages[first].role in ("system", "developer"):
        first += 1
    if first == len(messages):
        first = 0
    parts = []
    for start in range(len(messages) - 1, first, -1):
        if messages[start].role == "user":
            parts.append(replace(conversation, messages=messages[:first] + messages[start:]))
    return parts


def one_by_one(conversation: Conversation, tree: int) -> Iterator[Conversation]:
    """A conversation for each turn, as the model sees it when it answers: up to that turn, which alone is trained.

    Args:
        conversation: of any number of turns.
        tree: a number that keeps the results on one side of a split, unless the conversation has one of its own.
    """
    messages = conversation.messages
    questions = [index for index, message in enumerate(messages) if message.role == "user"]
    starts = [0, *questions[1:]]
    for start, end in zip(starts, [*questions[1:], len(messages)], strict=True):
        earlier = [replace(message, train=False) for message in messages[:start]]
        yield replace(conversation, messages=earlier + messages[start:end], tree=conversation.tree or tree)
