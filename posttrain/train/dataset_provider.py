"""Hand this project's rows to Megatron-Bridge: which rows, in which order, to which process."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.samplers import build_pretraining_data_loader
from megatron.core import parallel_state

from posttrain.train import rollback
from posttrain.train.batches import Collate, Counted, TrainOrder, ValidationOrder, blank_row


@dataclass
class RowsProvider(DatasetProvider):
    """Megatron-Bridge's dataset configuration for rows that are built already.

    Attributes:
        seq_length: tokens per row.
        skip_prompt_logits: whether the loss is computed from the logits of supervised tokens alone.
        consumed_samples: rows of this run that earlier processes have trained on; set before the data is opened.
    """

    seq_length: int = 0
    consumed_samples: int = 0
    skip_prompt_logits: bool = False

    @classmethod
    def of(cls, trainer: Any) -> "RowsProvider":
        """The provider of a trainer's rows: read ahead by workers where there is a GPU to keep busy."""
        on_gpu = trainer.platform.device == "cuda"
        workers = trainer.settings.num_workers if on_gpu else 0
        provider = cls(
            dataloader_type="external",
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
            seq_length=trainer.settings.seq_length,
            skip_prompt_logits=bool(trainer.spec.supervised_logits_only),
        )
        provider._trainer = trainer  # not a field: Megatron-Bridge writes the fields to run_config.yaml
        return provider

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Return the training batches; validation has batches of its own (see validation.py)."""
        t = self._trainer
        t.progress.rollbacks = rollback.merged(t.progress.rollbacks, rollback.read(t.run_dir))
        size = t.settings.global_batch_size
        skip = rollback.skipped(t.progress.rollbacks)
        rows = TrainOrder(t.splits.train, t.steps * size, t.config.seed, self.collate(), skip, size)
        t.train_order = rows
        t.counted = self.loader(rows, self.consumed_samples, t.settings.global_batch_size, self.num_workers)
        return t.counted, None, None

    def validation(self) -> Counted:
        """Return the batches of one validation: every row once, filled up to whole batches."""
        t = self._trainer
        samples = t.validation_steps * t.validation_batch_size
        length = self.seq_length if t.data.packing else 16
        rows = ValidationOrder(t.splits.validation, samples, blank_row(length, self.pad_id), self.collate())
        return self.loader(rows, 0, t.validation_batch_size, 0)

    def loader(self, rows: Any, consumed: int, global_batch_size: int, workers: int) -> Counted:
        """This process's micro-batches of `rows` from the row `consumed` on, in order."""
        if consumed >= len(rows):
            return Counted(iter(()))  # a run that had ended; Megatron's sampler refuses to give nothing
        loader = build_pretraining_data_loader(
            rows, consumed, "single", self._trainer.settings.micro_batch_size, workers, True,
            collate_fn=rows.collate_fn, pin_memory=self.pin_memory, persistent_workers=workers > 0,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            global_batch_size=global_batch_size,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # an iterator draws a seed for its workers, a resumed run one more
            return Counted(iter(loader), self._trainer.heartbeat.begin)

    @property
    def pad_id(self) -> int:
        """Id of padding tokens; any valid one, padding is masked by position."""
        return self._trainer.tokenizer.pad_token_id or 0

    def collate(self) -> Collate:
        """Return rows -> micro-batch, of one shape for all where a CUDA graph needs that."""
        t = self._trainer
        multiple = t.spec.micro_batch_multiple
        size, sequences, supervised = t.settings.micro_batch_size, None, None
        if t.spec.cuda_graph:
            splits = [rows for rows in (t.splits.train, t.splits.validation) if rows]
            most = max(int(np.diff(rows.starts).max()) for rows in splits)
            sequences = _up(size * (most + 1), 16)  # each row's padding is a sequence
            most = max(rows.most_supervised() for rows in splits)
            supervised = _up(size * most, 128)
        return Collate(self.seq_length if t.data.packing else None, self.pad_id, multiple, sequences, supervised)


def _up(value: int, multiple: int) -> int:
    """`value` rounded up: matrix kernels want sizes of whole tiles."""
    return value + -value % multiple
