"""Hand this project's batches to Megatron-Bridge's training loop."""

from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

if TYPE_CHECKING:
    from posttrain.train.batches import CountingIterator
    from posttrain.train.context import RunContext
    from posttrain.train.run_batches import RunBatches


@dataclass
class RowsProvider(DatasetProvider):
    """Megatron-Bridge's dataset configuration for rows that are built already.

    Attributes:
        seq_length: tokens per row.
        consumed_samples: rows of this run that earlier processes have trained on; set before the data is opened.
    """

    seq_length: int = 0
    consumed_samples: int = 0
    run_batches: InitVar["RunBatches | None"] = None  # no field: Megatron-Bridge writes those to run_config.yaml

    def __post_init__(self, run_batches: "RunBatches | None") -> None:
        self.batches = run_batches

    @classmethod
    def from_run(cls, run: "RunContext", batches: "RunBatches") -> "RowsProvider":
        """The provider of `batches`."""
        return cls(
            dataloader_type="external",
            num_workers=run.loader_workers,
            persistent_workers=run.loader_workers > 0,
            pin_memory=run.on_gpu,
            seq_length=run.settings.seq_length,
            run_batches=batches,
        )

    def build_datasets(self, context: DatasetBuildContext) -> tuple["CountingIterator", None, None]:
        """Return the training batches; validation has batches of its own (see validation.py)."""
        assert self.batches is not None
        return self.batches.training(self.consumed_samples), None, None
