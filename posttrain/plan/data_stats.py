"""Count the training data, as far as that is possible in a second or two."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig, OmegaConf

from posttrain.config.instantiate import built
from posttrain.data import packing, sources
from posttrain.data.checks import check
from posttrain.data.conversation import RowError
from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.utils import working
from posttrain.utils.cache import cache_root

if TYPE_CHECKING:
    from posttrain.data.dataset import PackedDataset
    from posttrain.data.prepare import RowEncoder
    from posttrain.data.readers import Place

SECONDS = 1.0  # of rendering conversations
COUNT_SECONDS = 1.0  # of counting the others
LEAST = 512  # conversations rendered in any case
LINES = (".jsonl", ".ndjson")
READ_BY = ["data", "objective", "template", "model", "cache_dir"]  # and trainer.seq_length, to which rows are cut


@dataclass(frozen=True)
class DataStats:
    """The training data as they would be packed.

    Attributes:
        conversations: of an epoch.
        tokens: in all.
        supervised_tokens: in all.
        rows: sequences of trainer.seq_length per epoch.
        most_tokens: tokens of a micro-batch, padding included, at most.
        most_supervised: supervised tokens of a micro-batch, at most.
        row_supervised: supervised tokens of a sequence, at most.
        squares: mean over tokens of the length of the conversation they are in.
        sequences: most conversations in a micro-batch.
        longest: tokens of the longest conversation in a micro-batch.
        read: conversations that were read, those held out included.
        all_read: whether these are all; else the rest is assumed to be like them.
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
    all_read: bool = True

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


def estimate_data(cfg: DictConfig, multiple: int = 1, kept: "Kept | None" = None) -> DataStats:
    """Render the first conversations, all where there is time, divide them as a run does, and pack them.

    Args:
        cfg: of the run.
        multiple: what a conversation is padded to a multiple of; see ParallelSizes.
        kept: of other plans of the same command, which read the same; added to.

    Raises:
        UserError: there is no tokenizer on this machine, or the data can't be read.
    """
    data, template = check(cfg)
    if not isinstance(data, TrainingData):
        raise UserError("data: is of a class of its own, and only a run counts its rows")
    seq_length = cfg.trainer.seq_length
    kept = {} if kept is None else kept
    key = f"{seq_length}\n{OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, READ_BY))}"
    if key not in kept:
        encoder = built(cfg.objective).encoder(data, template, load_tokenizer(cfg), seq_length)
        kept[key] = _read(data, encoder, cache_root(cfg.cache_dir))
    read = kept[key]
    scale = read.total / len(read.lengths)
    seed = data.seed_of(cfg.seed)
    trained, _ = data.divide(np.array(read.digests), np.array(read.trees), np.array(read.origins), seed)
    if not len(trained):
        raise UserError("data: no conversation is left to train on; see preview")
    if data.max_train_rows:
        scale = min(scale, data.max_train_rows / len(trained))
    lengths = np.array(read.lengths)[trained]
    if data.packing:
        order, starts = packing.pack(-(-lengths // multiple) * multiple, seq_length, seed)
    else:
        order, starts = packing.one_per_sequence(len(lengths))
    supervised = np.array(read.supervised)[trained]
    stats = DataStats.from_packing(lengths[order], supervised[order], starts, cfg, scale)
    return replace(stats, read=len(read.lengths), all_read=read.all_read)


@dataclass
class _Read:
    """The first samples of the data.

    Attributes:
        lengths, supervised: tokens of each, and how many of them are supervised.
        digests, trees, origins: what decides on which side of a split each is, and how often it is trained.
        all_read: whether there are no more.
        total: how many there are in all; an estimate where these aren't all.
    """

    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    trees: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    all_read: bool = True
    total: float = 0.0


type Kept = dict[str, _Read]  # by all that they depend on


def _read(data: TrainingData, encoder: "RowEncoder", cache: Path) -> _Read:
    """Encode samples for a while, of the last row that is read all.

    Raises:
        UserError: there are none, or the data can't be read.
    """
    read = _Read()
    began = None
    place = None
    for origin, sample in data.samples_of_sources(encoder, cache):
        working.phase("reading data", len(read.lengths), unit="conversations")
        began = began or time.monotonic()  # not before everything is imported
        next_row = place is not None and sample.place != place
        if next_row and len(read.lengths) >= LEAST and time.monotonic() - began > SECONDS:
            read.all_read = False
            break
        read.lengths.append(len(sample.encoded.input_ids))
        read.supervised.append(int(sample.encoded.mask[1:].sum()))
        read.digests.append(sample.digest)
        read.trees.append(sample.tree or 0)
        read.origins.append(origin)
        place = sample.place
    if not read.lengths:
        raise UserError("data: no conversation is left to train on; see preview")
    read.total = len(read.lengths)
    if place is not None and not read.all_read:
        read.total = _estimate_total(data, place, len(read.lengths), cache)
    return read


def _estimate_total(data: TrainingData, last: "Place", seen: int, cache: Path) -> float:
    """Estimate the number of samples of all files.

    Rows are counted where that is quick, else judged by their lines.

    Args:
        data: the files.
        last: where the last sample was read.
        seen: samples up to there.
        cache: the cache's root.

    Raises:
        UserError: neither can be done quickly.
    """
    source = data.all_sources()[0]
    if not isinstance(data.path, str) or source.on_hub:
        raise UserError("data: too many to count quickly, and from several sources")
    began = time.monotonic()
    count = 0
    up_to_last = 0
    for place, row in sources.rows(source, cache):
        count += not isinstance(row, RowError)
        if place == last:
            up_to_last = count
        if time.monotonic() - began > COUNT_SECONDS:
            break
    else:
        return seen * count / up_to_last
    files = source.files(cache)
    if str(files[0]) != str(last.file) or files[0].suffix not in LINES:
        raise UserError("data: too many to count quickly; of large files only JSON Lines can be")
    lines = 0
    with open(files[0], "rb") as stream:
        while chunk := stream.read(1 << 22):
            lines += chunk.count(b"\n")
    size = sum(map(os.path.getsize, files)) / files[0].stat().st_size
    return seen * lines / (last.row + 1) * size
