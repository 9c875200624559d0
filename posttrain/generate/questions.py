"""What a model is asked: prompts of the command line and of a file, as conversations."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.formats import Messages
from posttrain.data.formats.fields import variables
from posttrain.errors import UserError

ANSWERED = ("user", "tool")  # roles that an assistant's turn follows


def question(text: str) -> Conversation:
    """The conversation of a single prompt."""
    return Conversation([Message("user", text)])


def read_prompts(path: Path) -> list[Conversation]:
    """Read a file's conversations.

    It has a prompt per line, or, as .jsonl, {"prompt": ...} or {"messages": [...]} per line, which is read as training
    reads a row of `data=messages`: with `tools`, `system` and `chat_template_kwargs`.

    Raises:
        UserError: there is no such file, or a line is neither.
    """
    if not path.is_file():
        raise UserError(f"--file {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: can't be read: {error}") from None
    conversations = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            conversations.append(question(line))
            continue
        try:
            conversations.append(conversation_of(json.loads(line)))
        except RowError as error:
            raise UserError(f"--file {path}, line {number}: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"--file {path}, line {number}: not JSON: {error}") from None
    if not conversations:
        raise UserError(f"--file {path}: holds no prompt")
    return conversations


def conversation_of(row: object) -> Conversation:
    """The conversation of a row, which ends where an answer begins.

    Raises:
        RowError: it is none.
    """
    column = "messages"
    if not isinstance(row, dict) or not row.keys() & {"prompt", "messages"}:
        raise RowError('requires "prompt", a text, or "messages" with role and content')
    if "messages" not in row:
        column = "prompt"
        if isinstance(row["prompt"], str):
            row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    [conversation] = Messages(column=column).conversations(row)
    if not conversation.messages:
        raise RowError(f"`{column}` has no messages")
    last = conversation.messages[-1].role
    if last not in ANSWERED:
        raise RowError(f"the last of `{column}` is of the role {last}; there is nothing to answer")
    conversation.variables = variables(row)
    return conversation


def apply_options(
    conversations: Iterable[Conversation], system: str | None, template_variables: Mapping[str, Any]
) -> int:
    """Give conversations what the command line says, which wins over what a row says.

    Args:
        conversations: changed in place.
        system: the system prompt; None: a row's own stays.
        template_variables: of the chat template.

    Returns:
        How many had a system turn that was replaced.
    """
    replaced = 0
    for conversation in conversations:
        conversation.variables = {**conversation.variables, **template_variables}
        if system is None:
            continue
        if conversation.messages[0].role in ("system", "developer"):
            del conversation.messages[0]
            replaced += 1
        conversation.messages.insert(0, Message("system", system))
    return replaced
