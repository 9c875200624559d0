"""Supervised fine-tuning: cross entropy of the answers in conversations. No torch at import."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.prepare import RowEncoder
    from posttrain.data.templates import ChatTemplate
    from posttrain.objectives.objective import ForwardStep


@dataclass
class SFT:
    """The loss is the mean over all supervised tokens of a global batch."""

    metrics: ClassVar[Mapping[str, str]] = {"lm loss": "loss"}

    def check(self, data: "TrainingData", seq_length: int) -> None:
        """Refuse documents without turns, and conversations longer than a sequence."""
        if not isinstance(data, TrainingData):  # a user's own class, which knows what it reads
            return
        for form, key in data.formats():
            if hasattr(form, "documents"):
                raise UserError(f"`{key}`: reads documents, not conversations; choose objective=text")
            if not hasattr(form, "conversations") and not hasattr(form, "read"):
                raise UserError(f"`{key}`: is no format; name one of posttrain.data.formats, or one of your own")
        data.rules(seq_length)

    def encoder(
        self, data: "TrainingData", template: "ChatTemplate", tokenizer: "PreTrainedTokenizerFast", seq_length: int
    ) -> "RowEncoder":
        from posttrain.data.prepare import ConversationEncoder
        from posttrain.data.render import Renderer

        return ConversationEncoder(Renderer(template, tokenizer), tokenizer, data.rules(seq_length))

    def template(self, template: "ChatTemplate") -> "ChatTemplate | None":
        return template

    def weights(self, row: dict[str, np.ndarray]) -> np.ndarray:
        return row["loss_mask"].astype(np.float32)

    def forward_step(self, supervised_logits_only: bool) -> "ForwardStep":
        from posttrain.objectives.token_loss import TokenLoss

        return TokenLoss(supervised_logits_only)
