"""Continued pre-training on plain text: cross entropy of every token. No torch at import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError
from posttrain.objectives.sft import SFT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.prepare import RowEncoder
    from posttrain.data.templates import ChatTemplate

OF_CONVERSATIONS = ("train_on", "split_turns", "max_length", "truncation", "truncation_side")


@dataclass
class Text(SFT):
    """The loss is the mean over all tokens of a global batch. For the options see conf/objective/text.yaml.

    Attributes:
        document_boundaries: whether attention ends with a document.
        overlap: tokens that a window repeats from the one before it.
        append_eos: whether a document ends with the end-of-sequence token.
    """

    document_boundaries: bool = True
    overlap: int = 0
    append_eos: bool = True

    def check(self, data: TrainingData, seq_length: int) -> None:
        """Refuse conversations, and windows that only repeat."""
        if not 0 <= self.overlap < seq_length:
            raise UserError(f"objective.overlap={self.overlap}: must be at least 0 and below seq_length={seq_length}")
        if not isinstance(data, TrainingData):
            return
        for form, key in data.formats():
            if not hasattr(form, "documents"):
                raise UserError(f"`{key}`: reads conversations, not documents; choose data=text, or objective=sft")
        for name in OF_CONVERSATIONS:
            if getattr(data, name) != TrainingData.__dataclass_fields__[name].default:
                raise UserError(f"`data.{name}`: has no effect with objective=text; remove it")

    def encoder(
        self, data: TrainingData, template: "ChatTemplate", tokenizer: "PreTrainedTokenizerFast", seq_length: int
    ) -> "RowEncoder":
        from posttrain.data.documents import DocumentEncoder, Windows

        windows = Windows(seq_length, self.overlap, self.document_boundaries, self.append_eos)
        return DocumentEncoder(tokenizer, windows, data.on_error)

    def template(self, template: "ChatTemplate") -> None:
        return None
