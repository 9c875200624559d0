"""A model's own chat template, for prompts: rendered as training does, within the same limits of time and memory."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.data.conversation import Conversation, Message
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a Hugging Face fast tokenizer that has one.

    Raises:
        UserError: the template is broken.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.renderer = Renderer(ChatTemplate(require_stop=False), tokenizer)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation: of transformers' `apply_chat_template`, sandboxed and bounded.

        Args:
            messages: with role and content, and whatever else the template reads.
            add_generation_prompt: end where an answer begins. False: end with the last message's own text, so that it
                is continued.

        Raises:
            RowError: the template refuses the conversation, fails on it, or takes too much.
        """
        turns = []
        for message in messages:
            extra = {key: value for key, value in message.items() if key not in ("role", "content")}
            turns.append(Message(message["role"], message["content"], extra=extra))
        text = self.renderer.render(Conversation(turns), add_generation_prompt)
        plain = str.__str__(text)
        if add_generation_prompt:
            return plain
        last = len(turns) - 1
        ends = [end for _, end, source, _ in getattr(text, "spans", ()) if source.message == last]
        return plain[: max(ends)] if ends else plain
