"""The cached files behind a run's data: encoded conversations, and how they are packed into sequences."""

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data import fingerprint, packing, sealed, sources
from posttrain.data.dataset import PackedDataset
from posttrain.data.prepare import Counts, RowEncoder
from posttrain.data.sources import Source
from posttrain.data.store import Store, Writer
from posttrain.utils import working
from posttrain.utils.cache import build_once, check_private

log = logging.getLogger(__name__)


@dataclass
class DatasetBuilder:
    """Builds one run's datasets, and the cached files behind them.

    Attributes:
        pack: several samples in a sequence; False: one in each.
        multiple: each sample is padded to a multiple of this many tokens.
        encoder: makes samples of rows.
        cache: folder of the cached files.
        build: False: wait for another process to make them.
        used: is told which folders were opened.
        category: column with a row's category; None: none is kept.
        contents: digests of what each key of the configuration names.
        notes: what a person should know of the data.
    """

    pack: bool
    multiple: int
    encoder: RowEncoder
    cache: Path
    build: bool
    used: sealed.Used
    category: str | None = None
    contents: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def store(self, source: Source, limit: int | None) -> tuple[Store, dict[str, Any]]:
        """The encoded samples of a source, at most `limit`, and how many rows were kept and dropped."""
        if isinstance(source.path, str) and source.on_hub:
            from posttrain.data import hub_datasets  # loads `huggingface_hub`

            contents = [source.path, hub_datasets.revision(source.path, source.key)]
        else:
            files = source.files(self.cache.parent)
            contents = fingerprint.files_beside(files, self.cache)
            self.notes += sources.left_out(source) + sources.detected(files, source)
        self.contents.setdefault(source.key, []).extend(contents)
        name = fingerprint.digest(
            {
                "code": fingerprint.code(),
                "contents": contents,
                "format": source.form,
                "options": source.options,
                "where": source.where,
                "encoder": self.encoder.identity,
                "limit": limit,
                "category": self.category,
            }
        )
        target = self._made(self.cache / f"rows-{name}", lambda folder: self._write(folder, source, limit))
        return Store([target / "rows.arrow"]), json.loads((target / "counts.json").read_text(encoding="utf-8"))

    def _write(self, folder: Path, source: Source, limit: int | None) -> None:
        gc.freeze()  # what is loaded by now is not searched again and again for garbage: a tenth of the time
        try:
            self._write_rows(folder, source, limit)
        finally:
            gc.unfreeze()

    def _write_rows(self, folder: Path, source: Source, limit: int | None) -> None:
        counts = Counts()
        rows = sources.rows(source, self.cache.parent, self.category)
        started = shown = time.monotonic()
        with Writer(folder / "rows.arrow") as file:
            for samples in self.encoder.samples(rows, counts):
                over = 0
                if limit is not None:
                    over = counts.kept - limit
                file.write(samples[: len(samples) - max(over, 0)])
                now = time.monotonic()
                working.phase("reading data", counts.read, unit="rows")
                if now - shown > 5:
                    shown = now
                    log.info("data: %d rows read, %.0f rows/s", counts.read, counts.read / (now - started))
                if over >= 0 and limit is not None:
                    counts.kept = limit
                    break
        (folder / "counts.json").write_text(json.dumps(vars(counts)), encoding="utf-8")

    def packed(self, store: Store, rows: np.ndarray, seq_length: int, seed: int) -> PackedDataset:
        """Pack some of a store's rows."""
        if not self.pack:
            order, starts = packing.one_per_sequence(len(rows))
            return self._dataset(store, rows[order], starts)

        def write(folder: Path) -> None:
            order, starts = packing.pack(-(-store.lengths[rows] // self.multiple) * self.multiple, seq_length, seed)
            np.save(folder / "order.npy", rows[order])
            np.save(folder / "starts.npy", starts)

        digest = fingerprint.digest(
            [
                fingerprint.code(),
                [Path(path).parent.name for path in store.paths],
                seq_length,
                self.multiple,
                seed,
                hashlib.sha256(rows.tobytes()).hexdigest(),
            ]
        )
        target = self._made(self.cache / f"packed-{digest}", write)
        order = np.load(target / "order.npy", mmap_mode="r")
        starts = np.load(target / "starts.npy", mmap_mode="r")
        if not packing.fits(order, starts, len(store)):
            raise ValueError(f"{target}: order and starts are not of these conversations")
        return self._dataset(store, order, starts)

    def _dataset(self, store: Store, order: np.ndarray, starts: np.ndarray) -> PackedDataset:
        return PackedDataset(store, order, starts, self.multiple, self.encoder.pad_id)

    def _made(self, target: Path, write: Callable[[Path], None]) -> Path:
        """The folder `target`, made and sealed by this process or another."""
        made = []

        def write_sealed(folder: Path) -> None:
            write(folder)
            sealed.seal(folder)
            made.append(folder)

        if self.build:
            build_once(target, write_sealed, sealed.problem)
        else:
            self._wait(target)
        self.used.add(target, bool(made))
        return target

    @staticmethod
    def _wait(target: Path) -> None:
        """Until another process has made `target`."""
        check_private(target)
        waited = time.monotonic()
        while not target.is_dir() or sealed.problem(target):
            if time.monotonic() - waited > 60:
                waited = time.monotonic()
                log.info("data: waiting for another process to prepare it")
            time.sleep(0.2)
