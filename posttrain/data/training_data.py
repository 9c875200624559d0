"""Files to packed sequences: the object of the config group `data`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data import encodings, sources, tables
from posttrain.data.format_types import Format
from posttrain.data.readers import FileOptions
from posttrain.data.rules import Rules
from posttrain.data.sealed import Used
from posttrain.data.sources import Source
from posttrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from posttrain.data.cached import DatasetBuilder
    from posttrain.data.dataset import PackedDataset
    from posttrain.data.prepare import RowEncoder, Sample

_CHOICES = {
    "train_on": ("assistant", "last", "all"),
    "split_turns": ("never", "reasoning", "always"),
    "truncation": ("truncate", "drop", "error"),
    "truncation_side": ("right", "left"),
    "on_error": ("error", "skip"),
}

SPLIT_SEED = 1234  # not the run's, so that runs with different seeds are validated on the same rows
MOST_PASSES = 10_000  # over a source in an epoch; each is an index in memory for each conversation


@dataclass
class Splits:
    """Datasets of a run; `validation` may be None. `report` holds the statistics, JSON-able."""

    train: "PackedDataset"
    validation: "PackedDataset | None"
    report: dict[str, Any]

    def names(self) -> list[str]:
        """The split of each sample that was read of `data.path`, in order; empty: of none."""
        names = [""] * len(self.train.store)
        for name in ("train", "validation"):
            dataset = getattr(self, name)
            if dataset is not None and dataset.store is self.train.store:
                for index in dataset.order.tolist():
                    names[index] = name
        return names


@dataclass
class TrainingData:
    """Rows of files, encoded as the objective says. Each option is explained in conf/data/base/options.yaml."""

    format: Format
    path: str | Sequence[str] | None = None
    validation_path: str | Sequence[str] | None = None
    validation_fraction: float | None = None
    sources: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    where: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None
    train_on: str = "assistant"
    split_turns: str = "never"
    max_length: int | None = None
    truncation: str = "truncate"
    truncation_side: str = "right"
    packing: bool = True
    on_error: str = "error"
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    seed: int | None = None

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"data.{name}={getattr(self, name)}: must be one of {', '.join(choices)}")
        if self.split_turns != "never" and self.train_on != "assistant":
            raise UserError(
                f"data.split_turns={self.split_turns}: goes with data.train_on=assistant, not {self.train_on}: each "
                "answer is trained in one of the conversations"
            )
        if self.validation_fraction is not None:
            if not 0 < self.validation_fraction < 1:
                raise UserError(f"data.validation_fraction={self.validation_fraction}: must be between 0 and 1")
            if self.validation_path is not None:
                raise UserError("data.validation_fraction and data.validation_path exclude each other; set one to null")
        if self.encoding is not None:
            encodings.check(self.encoding)
        if self.delimiter is not None:
            tables.check_delimiter(self.delimiter)
        for name in ("max_length", "max_train_rows", "max_validation_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.sources and self.path is not None:
            if str(self.path).startswith(sources.DEMO):
                raise UserError("data.sources: say what their columns mean with data=NAME, e.g. data=messages")
            raise UserError("data.path and data.sources exclude each other; give one of them")
        if not self.sources and self.path is None:
            raise UserError("data.path: give the file, folder or pattern to train on, or data.sources")

    def build(
        self,
        *,
        encoder: "RowEncoder",
        seq_length: int,
        seed: int,
        cache_dir: Path,
        build: bool = True,
        length_multiple: int = 1,
        category: str | None = None,
        used: Used | None = None,
    ) -> Splits:
        """Encode, split and pack, or find it done in the cache.

        Any number of processes may call it at once: one does the work, the others wait and map its files.

        Args:
            encoder: an objective's, which says what a row becomes.
            seq_length: tokens per packed sequence.
            seed: of parts of sources and of the packing of training rows, unless `data.seed` is set.
            cache_dir: root of the cache.
            build: False: never do the work, only wait for another process to do it.
            length_multiple: pad each conversation to a multiple of this many tokens, which must divide `seq_length`;
                context parallelism of size c needs 2c.
            category: column with a row's category, kept in `Store.categories`; None: none is kept.
            used: is told which cached folders were opened, for the caller to check while it does other things; None:
                their content is checked before this returns.

        Raises:
            UserError: something about the data, the template or their combination is wrong.
        """
        from posttrain.data.cached import DatasetBuilder  # loads NumPy and Arrow

        opened = used or Used()
        cache = Path(cache_dir) / "data"
        for again in (False, True):  # what a disk has changed is made again, once
            builder = DatasetBuilder(self.packing, length_multiple, encoder, cache, build, opened, category)
            try:
                splits = self._assemble(builder, seq_length, seed)
            except UserError:
                raise
            except Exception as error:  # whatever libraries say of bytes that are not what was written
                gone = isinstance(error, FileNotFoundError)  # another process has found it damaged
                if again or not (opened.remove_damaged(verify=True) or gone):
                    raise
                continue
            if used is not None or again or not opened.remove_damaged():
                break
        return splits

    @property
    def split_seed(self) -> int:
        """Seed of everything that decides which rows are validated."""
        return SPLIT_SEED if self.seed is None else self.seed

    def _assemble(self, builder: "DatasetBuilder", seq_length: int, seed: int) -> Splits:
        import numpy as np

        from posttrain.data import splits

        seed = self.seed_of(seed)
        started = time.monotonic()
        limit = self._most_read()
        parts = [builder.store(source, limit) for source in self._sources()]
        train, counts = splits.join_stores(parts)
        if counts["split"]:
            builder.notes.append(
                f"data.split_turns={self.split_turns}: {counts['split']:,} of {counts['read']:,} conversations became "
                f"{counts['turns']:,}, one for each turn"
            )
        validation, validation_rows, validation_counts = None, np.empty(0, np.int64), None
        train_rows, held_out = self.divide(train.digests, train.trees, train.sources, seed)
        own_validation = self._validation_source()
        if own_validation is not None:
            validation, validation_counts = builder.store(own_validation, self.max_validation_rows)
            validation_rows = np.arange(len(validation))
        elif len(held_out):
            validation, validation_rows = train, held_out[: self.max_validation_rows]
        elif self.validation_fraction is not None:
            builder.notes.append(
                f"data.validation_fraction={self.validation_fraction}: nothing is held out: all of the "
                f"{len(train)} {builder.encoder.unit}s are the same, or of one tree"
            )
        if not len(train_rows):
            left_out = [f"{count:,} ({reason})" for reason, count in counts["dropped"].items()]
            why = f"left out: {', '.join(left_out)}" if left_out else "there are no rows"
            raise UserError(f"data.path={self.path}: nothing is left to train on; {why}")
        report: dict[str, Any] = {
            "unit": builder.encoder.unit,
            "row_unit": builder.encoder.row_unit,
            "rows": counts,
            "notes": builder.notes,
            "sha256": builder.contents,
        }
        datasets = {"train": builder.packed(train, train_rows, seq_length, seed)}
        report["train"] = splits.describe(datasets["train"], seq_length)
        if validation is not None and len(validation_rows):
            datasets["validation"] = builder.packed(validation, validation_rows, seq_length, self.split_seed)
            report["validation"] = splits.describe(datasets["validation"], seq_length)
            report["validation"]["also_in_train"] = int(
                np.isin(validation.digests[validation_rows], train.digests[train_rows]).sum()
            )
            if validation_counts:
                report["validation_rows"] = validation_counts
        report["seconds"] = round(time.monotonic() - started, 3)
        return Splits(datasets["train"], datasets.get("validation"), report)

    def _most_read(self) -> int | None:
        """How many samples of each source are read; None: all, since some are held out."""
        return self.max_train_rows if self.validation_fraction is None else None

    def samples(self, encoder: "RowEncoder", cache_dir: Path) -> "Iterator[Sample]":
        """Stream the samples of `path` in the order of `Splits.names`, without the cache.

        Raises:
            UserError: as `build`.
        """
        for _, sample in self.samples_of_sources(encoder, cache_dir):
            yield sample

    def samples_of_sources(self, encoder: "RowEncoder", cache_dir: Path) -> "Iterator[tuple[int, Sample]]":
        """As `samples`, each with the index of its source."""
        from posttrain.data.prepare import Counts  # loads NumPy

        for index, source in enumerate(self._sources()):
            batches = encoder.samples(sources.rows(source, Path(cache_dir)), Counts())
            for sample in islice(chain.from_iterable(batches), self._most_read()):
                yield index, sample

    def seed_of(self, run_seed: int) -> int:
        """Seed of parts of sources and of the packing of training rows."""
        return run_seed if self.seed is None else self.seed

    def divide(
        self, digests: "np.ndarray", trees: "np.ndarray", origins: "np.ndarray", seed: int
    ) -> "tuple[np.ndarray, np.ndarray]":
        """Which samples are trained on in an epoch, and which are held out of it.

        Args:
            digests: int64[n], see `Sample`.
            trees: int64[n], see `Sample`; 0: by itself.
            origins: int64[n], index of the source.
            seed: see `seed_of`.

        Returns:
            Indices of the samples to train on, as often as their source's weight says and as far as `max_train_rows`,
            and of those held out.
        """
        import numpy as np

        from posttrain.data import splits

        weights = np.array([source.weight for source in self._sources()])
        train, held_out = splits.hold_out(digests, self.validation_fraction or 0, self.split_seed, trees)
        return splits.repeat_by_weight(train, origins, weights, seed)[: self.max_train_rows], held_out

    def _sources(self) -> list[Source]:
        """What to train on."""
        if not self.sources:
            assert self.path is not None
            return [self._source(self.path, "data.path")]
        weighted = []
        for index, source in enumerate(self.sources):
            unknown = set(source) - {"path", "format", "weight", "where"}
            if unknown or "path" not in source:
                raise UserError(
                    f"data.sources[{index}]: needs `path`, may have `format`, `weight`, `where`; found {list(source)}"
                )
            path = source["path"]
            several = isinstance(path, list | tuple) and all(isinstance(one, str) for one in path)
            if not isinstance(path, str) and not several:
                raise UserError(f"data.sources[{index}].path={path}: must be text or a list of text")
            weight = source.get("weight", 1.0)
            if not isinstance(weight, int | float) or not 0 <= weight <= MOST_PASSES:
                raise UserError(
                    f"data.sources[{index}].weight={weight}: must be a number of passes, 0 to {MOST_PASSES}"
                )
            chosen = source.get("where", self.where)
            if chosen is not None and not isinstance(chosen, str):
                raise UserError(f"data.sources[{index}].where={chosen}: must be an expression, as text")
            form = source.get("format", self.format)
            weighted.append(replace(self._source(path, "data.path"), form=form, weight=float(weight), where=chosen))
        return weighted

    def _source(self, path: str | Sequence[str], key: str) -> Source:
        options = FileOptions(self.encoding, self.delimiter, self.sheet)
        return Source(path, self.format, key, options, self.where)

    def _validation_source(self) -> Source | None:
        if self.validation_path is None:
            return None
        return self._source(self.validation_path, "data.validation_path")

    def all_sources(self) -> list[Source]:
        """Everything that this configuration reads."""
        validation = self._validation_source()
        return self._sources() + ([] if validation is None else [validation])

    def formats(self) -> list[tuple[Format, str]]:
        """Every format of this configuration, with the key it is from."""
        formats = [(self.format, "data.format")]
        for index, source in enumerate(self.sources):
            if "format" in source:
                formats.append((source["format"], f"data.sources[{index}].format"))
        return formats

    def rules(self, seq_length: int) -> Rules:
        """What to do with each conversation.

        Raises:
            UserError: `max_length` is above `seq_length`.
        """
        length = self.max_length or seq_length
        if length > seq_length:
            raise UserError(f"data.max_length={length}: above trainer.seq_length={seq_length}")
        return Rules(self.train_on, length, self.truncation, self.truncation_side, self.on_error, self.split_turns)
