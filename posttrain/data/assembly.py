"""The splits of a run, from the encoded rows of its files."""

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data import splits
from posttrain.data.cached import DatasetBuilder
from posttrain.data.dataset import PackedDataset
from posttrain.errors import UserError

if TYPE_CHECKING:
    from posttrain.data.training_data import TrainingData


def assemble(
    data: "TrainingData", builder: DatasetBuilder, seq_length: int, seed: int
) -> tuple[PackedDataset, PackedDataset | None, dict[str, Any]]:
    """Encode, split and pack, or find it done in the cache; see `TrainingData.build`.

    Returns:
        The training split, that of validation, and the statistics.
    """
    if data.seed is not None:
        seed = data.seed
    started = time.monotonic()
    limit = data.most_read()
    parts, weights = [], []
    for source in data.weighted_sources():
        parts.append(builder.store(source["path"], source["format"], "data.path", limit))
        weights.append(float(source["weight"]))
    train, counts = splits.join_stores(parts)
    validation, validation_rows, validation_counts = None, np.empty(0, np.int64), None
    if data.validation_path is not None:
        key, limit = "data.validation_path", data.max_validation_rows
        validation, validation_counts = builder.store(data.validation_path, data.format, key, limit)
        validation_rows = np.arange(len(validation))
        train_rows = np.arange(len(train))
    else:
        train_rows, held_out = splits.hold_out(train.digests, data.validation_fraction or 0, seed, train.trees)
        if len(held_out):
            validation, validation_rows = train, held_out[: data.max_validation_rows]
        elif data.validation_fraction is not None:
            builder.notes.append(
                f"data.validation_fraction={data.validation_fraction}: nothing is held out: all of the "
                f"{len(train)} {builder.encoder.unit}s are the same, or of one tree"
            )
    train_rows = splits.repeat_by_weight(train_rows, train.sources, np.array(weights), seed)[: data.max_train_rows]
    if not len(train_rows):
        raise UserError(f"data.path={data.path}: nothing is left to train on: {json.dumps(counts['dropped'])}")
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
        datasets["validation"] = builder.packed(validation, validation_rows, seq_length, seed)
        report["validation"] = splits.describe(datasets["validation"], seq_length)
        report["validation"]["also_in_train"] = int(
            np.isin(validation.digests[validation_rows], train.digests[train_rows]).sum()
        )
        if validation_counts:
            report["validation_rows"] = validation_counts
    report["seconds"] = round(time.monotonic() - started, 3)
    return datasets["train"], datasets.get("validation"), report
