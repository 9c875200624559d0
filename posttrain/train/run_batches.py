"""A run's batches: which rows, in which order, to which process, and what was counted in them."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.bridge.data.samplers import build_pretraining_data_loader
from megatron.core import parallel_state

from posttrain.train import rollback
from posttrain.train.batches import Collate, CountingIterator, Counts, TrainOrder, ValidationOrder, blank_row
from posttrain.train.context import RunContext

BLANK_TOKENS = 16  # of a row of padding, before it is padded to the length of the others where that is needed
SEQUENCES_MULTIPLE = 16  # of the boundaries of a micro-batch of fixed shapes; each row's padding is a sequence
SUPERVISED_MULTIPLE = 128  # of its supervised positions: matrix kernels want sizes of whole tiles


class RunBatches:
    """Opens the training batches, and those of each validation.

    Args:
        run: the run.

    Attributes:
        order: of the training rows; without gaps until they are opened.
        counter: what was counted in the batches since it was last taken.
        forward_step: the objective's.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.collate = build_collate(run)
        self.counter = Counter(run)
        self.forward_step = run.groups.objective.forward_step(bool(run.spec.supervised_logits_only))
        self.blank = blank_row(round_up(BLANK_TOKENS, run.spec.micro_batch_multiple), self.collate.pad_id)
        self.order = self._order(())

    def training(self, consumed: int) -> CountingIterator:
        """Open the training batches of this process from the global row `consumed` on."""
        run = self.run
        run.progress.rollbacks = rollback.merged(run.progress.rollbacks, rollback.read(run.run_dir))
        self.order = self._order(rollback.skipped(run.progress.rollbacks))
        self.counter.batches = self._open(self.order, consumed, self.order.epoch.batch, run.loader_workers)
        return self.counter.batches

    def _order(self, skip: Sequence[int]) -> TrainOrder:
        """The order of the training rows without the steps from the places `skip` on."""
        run = self.run
        return TrainOrder(
            run.splits.train,
            batch=run.settings.global_batch_size,
            steps=run.steps,
            seed=run.config.seed,
            collate_fn=self.collate,
            blank=self.blank,
            skip=skip,
        )

    def validation(self) -> CountingIterator:
        """Open the batches of one validation: the same in every one, filled up to whole batches."""
        run = self.run
        assert run.splits.validation is not None
        size = run.validation_batch_size
        samples = run.validation_steps * size
        seed = run.groups.data.split_seed
        rows = ValidationOrder(run.splits.validation, samples, self.blank, self.collate, seed)
        share = parallel_state.get_data_parallel_world_size() * run.spec.micro_batch
        batches = self._open(rows, 0, size, 0)
        batches.beat = self._counted_beats(samples // share)
        return batches

    def _counted_beats(self, total: int) -> Callable[[], None]:
        """What is done at each of `total` micro-batches of a validation: a sign of life, and how far it is."""
        number = itertools.count(1)

        def beat() -> None:
            self.run.heartbeat.begin()
            self.run.screen.phase("validating", min(next(number), total), total)

        return beat

    def _open(
        self, rows: TrainOrder | ValidationOrder, consumed: int, global_batch_size: int, workers: int
    ) -> CountingIterator:
        """This process's micro-batches of `rows` from the row `consumed` on, in order."""
        if consumed >= len(rows):
            return CountingIterator(iter(()))  # a run that had ended; Megatron's sampler refuses to give nothing
        loader = build_pretraining_data_loader(
            rows,
            consumed,
            "single",
            self.run.spec.micro_batch,
            workers,
            True,
            collate_fn=rows.collate_fn,
            pin_memory=self.run.on_gpu,
            persistent_workers=workers > 0,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            global_batch_size=global_batch_size,
        )
        with torch.random.fork_rng(devices=[]):  # an iterator draws a seed for its workers, a resumed run one more
            return CountingIterator(iter(loader), self.run.heartbeat.begin)


class Counter:
    """Adds up over all processes what was trained on; the totals are kept in the run's progress.

    Args:
        run: the run.

    Attributes:
        batches: what counts them here; None: none were opened.
        step_seconds: of the steps since the last `collect`.
        since_log: over all processes, since `take`.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.batches: CountingIterator | None = None
        self.step_seconds = 0.0
        self.since_log = Counts()

    def collect(self) -> None:
        """Add what this process has counted since the last call to what the others have; a collective call."""
        own = Counts() if self.batches is None else self.batches.take()
        own = own._replace(step_seconds=self.step_seconds)
        self.step_seconds = 0.0
        counts = Counts(*sum_over_data(list(own), self.run.world))
        self.since_log = self.since_log.plus(counts)
        self.run.progress.supervised_tokens += int(counts.supervised_tokens)
        self.run.progress.tokens += int(counts.tokens)

    def take(self) -> Counts:
        """The counts since the last call."""
        counts = self.since_log
        self.since_log = Counts()
        return counts


def sum_over_data(values: list[float], world: int) -> list[float]:
    """Sum over the processes that see different data; a collective call."""
    if world == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor.tolist()


def maximum_over_all(values: list[float], world: int) -> list[float]:
    """Maxima over all processes; a collective call."""
    if world == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def build_collate(run: RunContext) -> Collate:
    """Return rows -> micro-batch, of one shape for all where a CUDA graph needs that."""
    size = run.spec.micro_batch
    used = [rows for rows in (run.splits.train, run.splits.validation) if rows]
    sequences = None
    supervised = None
    if run.spec.cuda_graph:
        most_sequences = 0
        most_supervised = 0
        for rows in used:
            most_sequences = max(most_sequences, int(np.diff(rows.starts).max()))
            supervised_of_row = np.add.reduceat(rows.store.supervised[rows.order], rows.starts[:-1])
            most_supervised = max(most_supervised, int(supervised_of_row.max()))
        sequences = round_up(size * (most_sequences + 1), SEQUENCES_MULTIPLE)
        supervised = round_up(size * most_supervised, SUPERVISED_MULTIPLE)
    return Collate(
        length=run.settings.seq_length if run.groups.data.packing else None,
        pad_id=run.tokenizer.pad_token_id or 0,  # any valid one, padding is masked by position
        weights=run.groups.objective.weights,
        multiple=run.spec.micro_batch_multiple,
        sequences=sequences,
        supervised=supervised,
        pad_blank=run.spec.one_shape,
        whole=all(rows.is_whole(run.settings.seq_length) for rows in (run.splits.train, run.splits.validation) if rows),
    )


def round_up(value: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return value + -value % multiple
