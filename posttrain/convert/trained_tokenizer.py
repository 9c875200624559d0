"""The tokenizer as a model was trained with it: written beside the weights, and proven to make the same tokens."""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.convert.artifacts import copy_tokenizer, set_end_token, write_chat_template
from posttrain.convert.megatron_logits import PROMPTS
from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import ExportRefused
from posttrain.models import HFModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONVERSATION = [Message("user", "Who wrote Faust?"), Message("assistant", "Goethe did."), Message("user", "When?")]


class TrainedTokenizer:
    """A model's tokenizer, with the chat template of its training and the special tokens that this one brought.

    Args:
        model: whose tokenizer it is.
        template: of the training; None: nothing is known of one.
        tokenizer: `model`'s, if it is loaded already; the template's missing special tokens are added in place.
    """

    def __init__(
        self, model: HFModel, template: ChatTemplate | None = None, tokenizer: "PreTrainedTokenizerFast | None" = None
    ) -> None:
        self.directory = Path(model.tokenizer_path)
        self.template = template
        self.tokenizer = tokenizer or model.load_tokenizer()
        self.renderer = Renderer(template, self.tokenizer) if template else None

    def __len__(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def stops(self) -> set[int]:
        """Ids that end an answer; none where no template is known."""
        if self.renderer is None:
            return set()
        return set(self.tokenizer.convert_tokens_to_ids(sorted(self.renderer.stops)))

    @cached_property
    def conversation(self) -> list[int] | None:
        """Ids of a fixed conversation up to where an answer begins; None without a template, or if it refuses it."""
        if self.renderer is None:
            return None
        try:
            text = self.renderer.render(Conversation(CONVERSATION), add_generation_prompt=True)
        except RowError:
            return None
        ids: list[int] = self.tokenizer(str(text), add_special_tokens=False).input_ids
        return ids

    def write(self, out: Path) -> None:
        """Write it to `out`, with the template and its end token; its files as they are if they make the same tokens.

        They don't where the template added tokens, or where transformers takes another class for them without the
        model's config.json. A whole model's must be in `out` already.
        """
        before = set(out.iterdir())
        copy_tokenizer(out, self.directory)
        if self._difference(HFModel(path=str(out)).load_tokenizer()):
            for file in set(out.iterdir()) - before:
                file.unlink()
            self._save(out)
        if self.renderer is None:
            return
        write_chat_template(out, self.renderer.source)
        ends = self.renderer.ends
        # A template that reads eos_token would write another text with another one.
        if ends and self.tokenizer.eos_token not in ends and "eos_token" not in self.renderer.source:
            set_end_token(out, ends[0])

    def _save(self, out: Path) -> None:
        own = self.tokenizer.chat_template
        with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch:
            try:
                self.tokenizer.chat_template = None  # written by itself, in the words of older readers too
                self.tokenizer.save_pretrained(scratch)
            finally:
                self.tokenizer.chat_template = own
            copy_tokenizer(out, Path(scratch))

    def check(self, directory: Path) -> dict[str, Any]:
        """Compare with the tokenizer in `directory`: its length, the ids of fixed texts and of a rendered conversation.

        Returns:
            What was compared.

        Raises:
            ExportRefused: it makes other tokens.
        """
        written = HFModel(path=str(directory)).load_tokenizer()
        difference = self._difference(written)
        if difference:
            raise refused(difference)
        report = {"tokens": len(written), "conversation": self.conversation is not None, "end_tokens": []}
        if self.template is None or self.conversation is None:
            return report
        rendered = written.apply_chat_template(
            [message.for_template() for message in CONVERSATION],
            add_generation_prompt=True,
            return_dict=True,
            **self.template.variables,
        )
        if rendered["input_ids"] != self.conversation:
            raise refused("renders a conversation as other tokens than in training")
        report["end_tokens"] = sorted(written.convert_ids_to_tokens(sorted(self.stops)))
        return report

    def _difference(self, written: "PreTrainedTokenizerFast") -> str | None:
        """What `written` does otherwise, in words; None: nothing that was looked for."""
        if added_tokens(written) != added_tokens(self.tokenizer) or len(written) != len(self.tokenizer):
            return f"has {len(written)} tokens or other special ones, in training it had {len(self.tokenizer)}"
        for text in PROMPTS:
            if written(text).input_ids != self.tokenizer(text).input_ids:
                return f"makes other tokens of {text[:24]!r}... than in training"
        return None


def added_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[int, str]:
    """Id -> the token and how it is looked for, of the tokens that are never split."""
    return {index: repr(token) for index, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}


def refused(reason: str) -> ExportRefused:
    """The error of a tokenizer that isn't the training's."""
    return ExportRefused(f"export refused: the written tokenizer {reason}; nothing was written")
