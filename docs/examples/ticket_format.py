"""A format of one's own: support tickets, where a row is a thread of posts and staff posts are the answers.

{"subject": "No sound", "posts": [{"by": "ann", "staff": false, "text": "..."}, {"by": "joe", "staff": true, ...}]}
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.conversation import Conversation, Message, RowError


@dataclass
class Tickets:
    """Posts in a row by the same side become one message; a thread that staff never answered is refused.

    Attributes:
        signature: whether the name of who answers is written under an answer.
    """

    signature: bool = False

    def conversations(self, row: Mapping[str, Any]) -> Iterator[Conversation]:
        """The row's conversations: here one.

        Raises:
            RowError: stops the run with the file and line, or is counted with data.on_error=skip.
        """
        messages = [Message("system", f"Support ticket: {row['subject']}")]
        for post in row["posts"]:
            role = "assistant" if post["staff"] else "user"
            text = post["text"] + (f"\n\n{post['by']}" if self.signature and post["staff"] else "")
            if messages[-1].role == role:
                messages[-1].content += f"\n\n{text}"
            else:
                messages.append(Message(role, text))
        if not any(message.role == "assistant" for message in messages):
            raise RowError(f"ticket {row['subject']!r}: nobody of the staff answered", "no answer")
        yield Conversation(messages)
