"""How much data there is, as far as that can be counted in a second or two."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from posttrain.errors import UserError

SECONDS = 1.0  # of rendering conversations, and of counting the others
LEAST = 512  # conversations rendered in any case
LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Rows:
    """The training data as it would be packed.

    Attributes:
        conversations, tokens, trained: in all.
        rows: sequences of trainer.seq_length per epoch.
        most_tokens, most_trained: of a micro-batch, places and trained tokens.
        row_trained: trained tokens of a row, at most.
        squares: mean over tokens of the length of the conversation they are in.
        sequences: most conversations in a micro-batch.
        longest: tokens of the longest conversation in a micro-batch.
        read: conversations that were looked at; the rest is taken to be like them.
    """

    conversations: int
    tokens: int
    trained: int
    rows: int
    most_tokens: int
    most_trained: int
    row_trained: int
    squares: float
    sequences: int
    longest: int
    read: int

    @classmethod
    def of(cls, lengths: Any, trained: Any, starts: Any, cfg: DictConfig, scale: float = 1.0) -> "Rows":
        """Sum up conversations in the order of their rows.

        Args:
            lengths, trained: int[n], tokens of each conversation, and how many of them are trained.
            starts: int[rows + 1]; row r holds the conversations from starts[r] to starts[r + 1].
            cfg: of the run.
            scale: there are as many times more of them.
        """
        import numpy as np

        t = cfg.trainer
        # The rows of each micro-batch, as posttrain.batches.TrainOrder gives them to one process in
        # the first epoch.
        order = np.random.default_rng([cfg.seed, 0]).permutation(len(starts) - 1)
        if t.max_steps is not None:
            order = order[: t.max_steps * t.global_batch_size]
        micro = t.micro_batch_size
        order = np.resize(order, -(-len(order) // micro) * micro).reshape(-1, micro)

        def most(values: Any) -> int:
            return int(np.add.reduceat(values, starts[:-1])[order].sum(1).max())

        packed = bool(cfg.data.get("packing", True))
        return cls(
            conversations=round(len(lengths) * scale),
            tokens=round(int(lengths.sum()) * scale),
            trained=round(int(trained.sum()) * scale),
            rows=max(1, round((len(starts) - 1) * scale)),
            most_tokens=micro * t.seq_length if packed else most(lengths),
            most_trained=most(trained),
            row_trained=int(np.add.reduceat(trained, starts[:-1]).max()),
            squares=float((lengths.astype(float) ** 2).sum() / lengths.sum()),
            sequences=most(np.ones_like(lengths)) + (micro if packed else 0),  # padding is one
            longest=int(np.maximum.reduceat(lengths, starts[:-1])[order].max()),
            read=len(lengths),
        )


def of_bins(bins: Any, cfg: DictConfig) -> Rows:
    """The rows of a run, which are built (a posttrain.data.dataset.PackedDataset)."""
    order = bins.order
    return Rows.of(bins.store.lengths[order], bins.store.trained[order], bins.starts, cfg)


def count(cfg: DictConfig) -> Rows:
    """Render the first conversations, all where there is time, and pack them.

    Raises:
        UserError: there is no tokenizer at hand, or the data can't be read.
    """
    import numpy as np

    from posttrain.cache import cache_root
    from posttrain.data import packing
    from posttrain.data.check import check
    from posttrain.preview import load_tokenizer

    data, template = check(cfg)
    length, cache = cfg.trainer.seq_length, cache_root(cfg.cache_dir)
    samples = data.samples(tokenizer=load_tokenizer(cfg), template=template, seq_length=length, cache_dir=cache)
    lengths, trained, whole = [], [], True
    limit = data.max_train_rows if data.validation_fraction is None else None
    began = None
    for sample in samples:
        began = began or time.monotonic()  # not before everything is imported
        lengths.append(len(sample.encoded.input_ids))
        trained.append(int(sample.encoded.mask[1:].sum()))
        last = sample.place
        if limit and len(lengths) >= limit:
            break
        if len(lengths) >= LEAST and time.monotonic() - began > SECONDS:
            whole = False
            break
    if not lengths:
        raise UserError("data: no conversation is left to train on; see preview")
    total = len(lengths) if whole else _total(data, last, len(lengths), cache)
    sizes, marks = np.array(lengths), np.array(trained)
    order, starts = packing.pack(sizes, length, cfg.seed) if data.packing else packing.one_per_bin(len(sizes))
    scale = total / len(lengths) * (1 - (data.validation_fraction or 0))
    if data.max_train_rows:
        scale = min(scale, data.max_train_rows / len(lengths))
    return Rows.of(sizes[order], marks[order], starts, cfg, scale)


def _total(data: Any, last: Any, seen: int, cache: Path) -> float:
    """Conversations of all files where `seen` were found up to the place `last`: counted, else judged by their lines.

    Raises:
        UserError: neither can be done quickly.
    """
    from posttrain.data import sources

    if not isinstance(data.path, str) or data.path.startswith(sources.HUB):
        raise UserError("data: too much to be counted quickly, and from several sources")
    began = time.monotonic()
    for number, _ in enumerate(sources.conversations(data.path, data.format, "data.path", cache), 1):  # noqa: B007
        if time.monotonic() - began > SECONDS:
            break
    else:
        return number
    files = sources.files(data.path, "data.path", cache)
    if str(files[0]) != str(last.file) or files[0].suffix not in LINES:
        raise UserError("data: too much to be counted quickly; of large files only JSON Lines can be")
    with open(files[0], "rb") as stream:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 22), b""))
    size = sum(file.stat().st_size for file in files) / files[0].stat().st_size
    return seen * lines / (last.row + 1) * size
