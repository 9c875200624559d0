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
        stop: ids that end an answer, after which a batch's other answers may go on.
        name: of the phase that is shown.

    Attributes:
        tokens: of the longest answer of this batch so far.
        generated: tokens of all answers so far, with those that end them.
    """

    def __init__(self, most: int, prompts: int, stop: Collection[int] = (), name: str = PHASE) -> None:
        self.most = most
        self.prompts = prompts
        self.stop = stop
        self.name = name
        self.answered = self.batch = self.tokens = self.generated = 0
        self.going = [True] * prompts  # of this batch's answers, whether it has not ended
        self.before = 0.0  # seconds of the batches before
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the answers have taken so far."""
        if not self.batch:
            return self.before
        return self.before + time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Tokens a second, of all answers together; 0 before the first."""
        seconds = self.seconds
        if not seconds:
            return 0.0
        return self.generated / seconds

    def put(self, value: torch.Tensor) -> None:
        """Take the token ids of the prompts, [batch, length], then the next token of each, [batch]."""
        if value.dim() == 2:
            self.batch = len(value)
            self.tokens = 0
            self.going = [True] * self.batch
            self.began = time.monotonic()
        else:
            self.tokens += 1
            self.generated += sum(self.going)
            for row, token in enumerate(value.tolist()):
                self.going[row] = self.going[row] and token not in self.stop
        working.phase(self.name, self.tokens, unit=self.described())

    def described(self) -> str:
        """The words after the number of tokens."""
        text = f"of at most {self.most:,} tokens"
        if self.prompts > 1:
            first, last = self.answered + 1, self.answered + self.batch
            text += f", prompts {first:,} to {last:,} of {self.prompts:,}"
        if self.generated and self.prompts > 1:
            text += f", {self.generated:,} tokens in all"
        if self.generated:
            text += f", {self.rate:.1f} a second"
        return text

    def end(self) -> None:
        """The batch is answered."""
        self.before = self.seconds
        self.answered += self.batch
        self.batch = 0


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
        super().__init__(most, prompts=1, stop=stop)
        self.tokenizer = tokenizer.backend_tokenizer
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
