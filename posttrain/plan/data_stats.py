"""Count the training data, as far as that is possible in a second or two."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig

from posttrain.config.instantiate import built
from posttrain.data import packing, sources
from posttrain.data.checks import check
from posttrain.data.conversation import RowError
from posttrain.errors import UserError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.utils import working
from posttrain.utils.cache import cache_root

if TYPE_CHECKING:
    from posttrain.data.dataset import PackedDataset
    from posttrain.data.readers import Place
    from posttrain.data.training_data import TrainingData

SECONDS = 1.0  # of rendering conversations, and of counting the others
LEAST = 512  # conversations rendered in any case
LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class DataStats:
    """The training data as they would be packed.

    Attributes:
        conversations: in all.
        tokens: in all.
        supervised_tokens: in all.
        rows: sequences of trainer.seq_length per epoch.
        most_tokens: tokens of a micro-batch, padding included, at most.
        most_supervised: supervised tokens of a micro-batch, at most.
        row_supervised: supervised tokens of a sequence, at most.
        squares: mean over tokens of the length of the conversation they are in.
        sequences: most conversations in a micro-batch.
        longest: tokens of the longest conversation in a micro-batch.
        read: conversations that were read; the rest is assumed to be like them.
    """

    conversations: int
    tokens: int
    supervised_tokens: int
    rows: int
    most_tokens: int
    most_supervised: int
    row_supervised: int
    squares: float
    sequences: int
    longest: int
    read: int

    @classmethod
    def from_packing(
        cls,
        lengths: np.ndarray,
        supervised: np.ndarray,
        starts: np.ndarray,
        cfg: DictConfig,
        scale: float = 1.0,
    ) -> "DataStats":
        """Sum up packed conversations.

        Args:
            lengths: int[n], tokens of each conversation, in the order of packed sequences.
            supervised: int[n], how many of them are supervised.
            starts: int[rows + 1]; sequence i holds the conversations starts[i] to starts[i + 1].
            cfg: of the run.
            scale: how many times more conversations there are.
        """
        trainer = cfg.trainer
        # The sequences of each micro-batch, as posttrain.train.batches.TrainOrder gives them to one
        # process in the first epoch.
        order = np.random.default_rng([cfg.seed, 0]).permutation(len(starts) - 1)
        if trainer.max_steps is not None:
            order = order[: trainer.max_steps * trainer.global_batch_size]
        micro = trainer.micro_batch_size
        order = np.resize(order, -(-len(order) // micro) * micro).reshape(-1, micro)

        def most(values: np.ndarray) -> int:
            """The largest sum of a micro-batch."""
            return int(np.add.reduceat(values, starts[:-1])[order].sum(1).max())

        most_tokens = most(lengths)
        sequences = most(np.ones_like(lengths))
        if cfg.data.get("packing", True):
            most_tokens = micro * trainer.seq_length
            sequences += micro  # padding is one
        return cls(
            conversations=round(len(lengths) * scale),
            tokens=round(int(lengths.sum()) * scale),
            supervised_tokens=round(int(supervised.sum()) * scale),
            rows=max(1, round((len(starts) - 1) * scale)),
            most_tokens=most_tokens,
            most_supervised=most(supervised),
            row_supervised=int(np.add.reduceat(supervised, starts[:-1]).max()),
            squares=float((lengths.astype(float) ** 2).sum() / lengths.sum()),
            sequences=sequences,
            longest=int(np.maximum.reduceat(lengths, starts[:-1])[order].max()),
            read=len(lengths),
        )

    @classmethod
    def from_dataset(cls, dataset: "PackedDataset", cfg: DictConfig) -> "DataStats":
        """Sum up a run's data, which are packed."""
        order = dataset.order
        lengths, supervised = dataset.store.lengths[order], dataset.store.supervised[order]
        return cls.from_packing(lengths, supervised, dataset.starts, cfg)


def estimate_data(cfg: DictConfig) -> DataStats:
    """Render the first conversations, all where there is time, and pack them.

    Raises:
        UserError: there is no tokenizer on this machine, or the data can't be read.
    """
    data, template = check(cfg)
    seq_length = cfg.trainer.seq_length
    cache = cache_root(cfg.cache_dir)
    encoder = built(cfg.objective).encoder(data, template, load_tokenizer(cfg), seq_length)
    samples = data.samples(encoder, cache)
    lengths: list[int] = []
    supervised: list[int] = []
    complete = True
    limit = data.max_train_rows if data.validation_fraction is None else None
    began = None
    for sample in samples:
        working.phase("reading data", len(lengths), unit="conversations")
        began = began or time.monotonic()  # not before everything is imported
        lengths.append(len(sample.encoded.input_ids))
        supervised.append(int(sample.encoded.mask[1:].sum()))
        last = sample.place
        if limit and len(lengths) >= limit:
            break
        if len(lengths) >= LEAST and time.monotonic() - began > SECONDS:
            complete = False
            break
    if not lengths:
        raise UserError("data: no conversation is left to train on; see preview")
    scale = 1.0
    if not complete:
        scale = _estimate_total(data, last, len(lengths), cache) / len(lengths)
    scale *= 1 - (data.validation_fraction or 0)
    if data.max_train_rows:
        scale = min(scale, data.max_train_rows / len(lengths))
    sizes = np.array(lengths)
    if data.packing:
        order, starts = packing.pack(sizes, seq_length, cfg.seed)
    else:
        order, starts = packing.one_per_sequence(len(sizes))
    return DataStats.from_packing(sizes[order], np.array(supervised)[order], starts, cfg, scale)


def _estimate_total(data: "TrainingData", last: "Place", seen: int, cache: Path) -> float:
    """Estimate the number of conversations of all files.

    They are counted where that is quick, else judged by their lines.

    Args:
        data: the files.
        last: where the last conversation was read.
        seen: conversations up to there.
        cache: the cache's root.

    Raises:
        UserError: neither can be done quickly.
    """
    source = data.all_sources()[0]
    if not isinstance(data.path, str) or source.on_hub:
        raise UserError("data: too many to count quickly, and from several sources")
    began = time.monotonic()
    count = 0
    for _, row in sources.rows(source, cache):
        count += not isinstance(row, RowError)
        if time.monotonic() - began > SECONDS:
            break
    else:
        return count
    files = source.files(cache)
    if str(files[0]) != str(last.file) or files[0].suffix not in LINES:
        raise UserError("data: too many to count quickly; of large files only JSON Lines can be")
    lines = 0
    with open(files[0], "rb") as stream:
        while chunk := stream.read(1 << 22):
            lines += chunk.count(b"\n")
    size = sum(map(os.path.getsize, files)) / files[0].stat().st_size
    return seen * lines / (last.row + 1) * size
