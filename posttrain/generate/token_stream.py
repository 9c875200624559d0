"""What is told while a model answers: how many tokens there are, and on a terminal the text itself."""

import time
from collections.abc import Callable, Collection

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from posttrain.utils import working

PHASE = "answering"


class Progress(BaseStreamer):
    """Counts the tokens of the answers that `generate` makes.

    Args:
        most: tokens of an answer.
        prompts: that are to be answered, in batches.
    """

    def __init__(self, most: int, prompts: int) -> None:
        self.most = most
        self.prompts = prompts
        self.answered = self.batch = self.tokens = 0
        self.began = time.monotonic()

    def put(self, value: torch.Tensor) -> None:
        """Take the token ids of the prompts, [batch, length], then the next token of each, [batch]."""
        if value.dim() == 2:
            self.batch = len(value)
            self.tokens = 0
            self.began = time.monotonic()
        else:
            self.tokens += 1
        working.phase(PHASE, self.tokens, unit=self.described())

    def described(self) -> str:
        """The words after the number of tokens."""
        text = f"of at most {self.most:,} tokens"
        if self.tokens:
            text += f", {self.tokens / (time.monotonic() - self.began):.1f} a second"
        if self.prompts > 1:
            first, last = self.answered + 1, self.answered + self.batch
            text += f", prompts {first} to {last} of {self.prompts}"
        return text

    def end(self) -> None:
        """The batch is answered."""
        self.answered += self.batch


class AnswerStream(Progress):
    """Hands on the text of a lone answer as it grows.

    Args:
        most: tokens of the answer.
        tokenizer: of the model.
        stop: ids that end the answer, and are no part of it.
        show: gets the pieces of the text.

    Attributes:
        shown: the text so far; characters of several tokens come with the last of them.
        undecoded: whether bytes have come that are no text, after which only the whole answer can be decoded.
    """

    def __init__(
        self, most: int, tokenizer: PreTrainedTokenizerFast, stop: Collection[int], show: Callable[[str], None]
    ) -> None:
        super().__init__(most, prompts=1)
        self.tokenizer = tokenizer.backend_tokenizer
        self.stop = stop
        self.show = show
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.shown = ""
        self.undecoded = False

    def put(self, value: torch.Tensor) -> None:
        """As of `Progress`."""
        super().put(value)
        if value.dim() == 2 or self.undecoded or value.item() in self.stop:
            return
        try:
            self._show(self.decoder.step(self.tokenizer, value.item()))
        except Exception:  # tokenizers has no kind of its own for bytes that are no text
            self.undecoded = True

    def finish(self, text: str) -> None:
        """Show what is left of the whole answer, `text`; all of it on a new line where it doesn't begin as shown."""
        rest = text.removeprefix(self.shown)
        if not text.startswith(self.shown):
            rest = f"\n{text}"
        self._show(rest)

    def _show(self, piece: str | None) -> None:
        if piece:
            self.shown += piece
            self.show(piece)
