"""The conversations of a set as training would see them: the same rendering, truncation, mask and split."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from posttrain.data.check import built
from posttrain.errors import UserError


@dataclass
class Rows:
    """A set's conversations.

    Attributes:
        ids, masks: per conversation token ids int32[n] and uint8[n], 1 where a token is trained.
        categories: per conversation, None where its row names none.
        sources: per conversation, the index in data.sources.
        split: which part of the data they are.
        report: what `SFTData.build` counted: rows read, kept, truncated, dropped and why.
    """

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    categories: list[str | None]
    sources: list[int]
    split: str
    report: dict[str, Any]


def read(cfg: DictConfig, tokenizer: Any, cache_dir: Path) -> Rows:
    """Build a set with `SFTData.build`, and take the split that is asked for.

    Args:
        cfg: of the set.
        tokenizer: the model's; special tokens are added to it if the template says so.

    Raises:
        UserError: as training would for the same words; or there is no such split.
    """
    options = cfg.evaluate
    # Packing puts conversations in another order and changes nothing else.
    data = replace(built(cfg.data), packing=False)
    splits = data.build(
        tokenizer=tokenizer, template=built(cfg.template), seq_length=cfg.trainer.seq_length, seed=cfg.seed,
        cache_dir=cache_dir, category=options.by,
    )  # fmt: skip
    split = options.split
    if split == "auto":
        split = "validation" if splits.validation is not None else "train"
    bins = getattr(splits, split)
    if bins is None:
        raise UserError(f"evaluate.split={split}: the data has no validation split; see data.validation_fraction")
    order = np.unique(bins.order)[: options.limit]  # in the order of the files; each once, whatever its weight
    pairs = [bins.store[int(index)] for index in order]
    categories = bins.store.categories()
    report = splits.report["rows"]
    if split == "validation":
        report = splits.report.get("validation_rows", report)
    return Rows(
        [ids for ids, _ in pairs], [mask for _, mask in pairs], [categories[index] for index in order],
        bins.store.sources[order].tolist(), split, report,
    )  # fmt: skip


def last_answer(ids: np.ndarray, mask: np.ndarray) -> tuple[list[int], list[int]] | None:
    """(prompt, reference) ids: what stands before the last trained span, and that span; None: nothing before it."""
    trained = np.flatnonzero(mask)
    if not len(trained):
        return None
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
    return (ids[:start].tolist(), ids[start : int(trained[-1]) + 1].tolist()) if start else None
