"""What an objective decides; everything else of a run is the same for all. No torch at import.

| part | asked by |
|---|---|
| `check`, `encoder` | the checks before a run, data preparation, preview, plan, evaluation |
| `weights` | the collate function: what each token's loss counts |
| `forward_step`, `metrics` | the training loop, validation, metrics.jsonl |
| `template` | the export: the chat template that belongs to the weights |
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.prepare import RowEncoder
    from posttrain.data.templates import ChatTemplate
    from posttrain.data.training_data import TrainingData

# As Megatron-Bridge calls it: (state, data_iterator, model) -> (output, output -> (sum, count, report)).
ForwardStep = Callable[..., tuple[Any, Callable[..., Any]]]


class Objective(Protocol):
    """An objective.

    Attributes:
        metrics: names of the forward step's report -> columns of metrics.jsonl; the first is the loss, which validation
            measures and a sweep minimises.
    """

    metrics: Mapping[str, str]

    def check(self, data: "TrainingData", seq_length: int) -> None:
        """Refuse what can't be trained for, before anything is read.

        Raises:
            UserError: naming the key.
        """
        ...

    def encoder(
        self, data: "TrainingData", template: "ChatTemplate", tokenizer: "PreTrainedTokenizerFast", seq_length: int
    ) -> "RowEncoder":
        """What a row of the files becomes.

        Raises:
            UserError: template and tokenizer don't go together.
        """
        ...

    def template(self, template: "ChatTemplate") -> "ChatTemplate | None":
        """The chat template that the weights are trained with; None: none, the model keeps its own."""
        ...

    def weights(self, row: dict[str, np.ndarray]) -> np.ndarray:
        """What each label's loss counts.

        Args:
            row: a packed sequence as posttrain.data.dataset.PackedDataset gives it.

        Returns:
            float32[n], 0 where a label isn't supervised. The sum is a whole number, of tokens or of conversations: a
            global batch's loss is the sum over all ranks and micro-batches divided by the sum of all weights.
        """
        ...

    def forward_step(self, supervised_logits_only: bool) -> ForwardStep:
        """Return what computes the loss of a micro-batch.

        Args:
            supervised_logits_only: whether the output layer sees the tokens with a weight alone.
        """
        ...
