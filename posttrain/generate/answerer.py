"""A loaded model that answers conversations."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from posttrain.data.conversation import Conversation, RowError
from posttrain.data.encode import Encoder, Rendered
from posttrain.data.presence import find_unread
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.generate.decoding import check_fits, continuations, stop_tokens
from posttrain.generate.sampling import Sampling
from posttrain.generate.token_stream import AnswerStream, Progress
from posttrain.models.tokenizer_files import failures
from posttrain.utils.escape import encodable

OWN_TEMPLATE = ChatTemplate(require_stop=False)


class Answerer:
    """A loaded model that answers conversations.

    Args:
        model: as posttrain.generate.live_model.load_model returns it.
        tokenizer: as posttrain.generate.live_model.load_model returns it.
        sampling: how to choose tokens.
        batch_size: conversations at once.
        template: how the tokenizer's chat template is used.

    Attributes:
        renderer: the chat template; None: the tokenizer has none.

    Raises:
        UserError: the tokenizer's chat template is broken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        sampling: Sampling,
        batch_size: int = 8,
        template: ChatTemplate = OWN_TEMPLATE,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.batch_size = batch_size
        self.stop = stop_tokens(model, tokenizer)
        self.pad = tokenizer.pad_token_id
        if self.pad is None:
            self.pad = min(self.stop, default=0)
        self.renderer = Renderer(template, tokenizer) if tokenizer.chat_template else None

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the text that follows each prompt of `encode`."""
        return self._answer(prompts, Progress(self.sampling.max_new_tokens, len(prompts), self.stop))

    def stream(self, prompt: Sequence[int], show: Callable[[str], None]) -> str:
        """Return the text that follows a prompt of `encode`, whose pieces `show` gets as they come."""
        stream = AnswerStream(self.sampling.max_new_tokens, self.tokenizer, self.stop, show)
        [text] = self._answer([prompt], stream)
        stream.finish(text)
        return text

    def _answer(self, prompts: Sequence[Sequence[int]], progress: Progress) -> list[str]:
        check_fits(self.model, prompts, new_tokens=1)
        answers = dict(
            continuations(self.model, prompts, self.stop, self.pad, self.sampling, self.batch_size, progress)
        )
        texts = []
        for index in range(len(prompts)):
            texts.append(self.tokenizer.decode(answers[index], skip_special_tokens=True))
        return texts

    def encode(self, conversation: Conversation) -> list[int]:
        """Return a prompt's ids: rendered and tokenized as in training; a lone text without a chat template.

        Raises:
            UserError: the template refuses it, leaves a part of it out or fails on it, or the tokenizer does; or there
                is no template for what is more than a text.
        """
        messages = [replace(message, content=encodable(message.content)) for message in conversation.messages]
        last = messages[-1].content
        try:
            with failures(self.tokenizer.name_or_path, "the tokenizer fails on a prompt"):
                if self.renderer is not None:
                    return self._encode_with(self.renderer, replace(conversation, messages=messages))
                if len(messages) > 1 or conversation.tools:
                    raise UserError(
                        "the tokenizer has no chat template, which a system prompt, earlier turns and tools require"
                    )
                return self.tokenizer(last)["input_ids"]
        except UserError as error:
            raise UserError(f"prompt {last[:40]!r}: {error}") from None

    def _encode_with(self, renderer: Renderer, conversation: Conversation) -> list[int]:
        """The ids of a prompt in the words of a chat template."""
        try:
            text = renderer.render(conversation, add_generation_prompt=True)
            rendered = Rendered(conversation, text, None, renderer.special_text(conversation), prompted=True)
            [encoded] = Encoder(self.tokenizer, renderer)([rendered])
        except RowError as error:
            raise UserError(error.reason) from None
        if isinstance(encoded, RowError):
            raise UserError(encoded.reason)
        try:
            find_unread(conversation, text, [], renderer)
        except RowError as error:  # its reason says what to do about a row that is trained
            raise UserError(error.kind) from None
        return encoded.input_ids.tolist()
