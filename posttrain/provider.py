"""Hand this project's rows to Megatron-Bridge's data loaders."""

from dataclasses import dataclass
from typing import Any

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

from posttrain.batches import Collate, TrainOrder, ValidationOrder, blank_row


@dataclass
class RowsProvider(DatasetProvider):
    """Megatron-Bridge's dataset configuration for rows that are built already.

    Attributes:
        seq_length: tokens per row.
        skip_getting_attention_mask_from_dataset: False makes middle pipeline stages read sequence boundaries too.
    """

    seq_length: int = 0
    skip_getting_attention_mask_from_dataset: bool = False

    @classmethod
    def of(cls, trainer: Any) -> "RowsProvider":
        """The provider of a trainer's rows: read in the order of their index, by workers where there are cores."""
        workers = trainer.settings.num_workers if trainer.platform.device == "cuda" else 0
        provider = cls(
            dataloader_type="single",
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=trainer.platform.device == "cuda",
            seq_length=trainer.settings.seq_length,
        )
        provider._trainer = trainer  # not a field: Megatron-Bridge writes the fields to run_config.yaml
        return provider

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Return the training rows; validation has a loader of its own (see callbacks)."""
        t = self._trainer
        samples = t.steps * t.settings.global_batch_size
        return TrainOrder(t.splits.train, samples, t.config.seed, self.collate()), None, None

    def validation(self) -> ValidationOrder:
        """Return the validation rows, filled up to whole batches."""
        t = self._trainer
        samples = t.validation_steps * t.validation_batch_size
        length = self.seq_length if t.data.packing else 16
        return ValidationOrder(t.splits.validation, samples, blank_row(length, self.pad_id), self.collate())

    @property
    def pad_id(self) -> int:
        """Id of padding tokens; any valid one, padding is masked by position."""
        return self._trainer.tokenizer.pad_token_id or 0

    def collate(self) -> Collate:
        """Return rows -> micro-batch."""
        t = self._trainer
        p = t.parallelism
        multiple = p.tensor_model_parallel_size * p.context_parallel_size * (2 if p.context_parallel_size > 1 else 1)
        return Collate(self.seq_length if t.data.packing else None, self.pad_id, multiple)
