"""The conversations of a set as training sees them: the same template, truncation, mask and split."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from posttrain.config.instantiate import built
from posttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Conversations:
    """A set's conversations.

    Attributes:
        ids: token ids int32[n] of each conversation.
        masks: uint8[n] of each conversation, 1 where a token is supervised.
        categories: of each conversation, None where its row has none.
        sources: of each conversation, the index in data.sources.
        split: which part of the data they are.
        report: what `TrainingData.build` counted: rows read, kept, truncated, dropped and why.
    """

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    categories: list[str | None]
    sources: list[int]
    split: str
    report: dict[str, Any]


def read_conversations(cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", cache_dir: Path) -> Conversations:
    """Build a set with `TrainingData.build` and return the configured split.

    Args:
        cfg: of the set.
        tokenizer: the model's; the template may add special tokens to it.
        cache_dir: where the tokenized data are stored.

    Raises:
        UserError: as training would for the same overrides; or there is no such split.
    """
    options = cfg.evaluate
    # Packing only changes the order of the conversations.
    data = replace(built(cfg.data), packing=False)
    encoder = built(cfg.objective).encoder(data, built(cfg.template), tokenizer, cfg.trainer.seq_length)
    splits = data.build(
        encoder=encoder,
        seq_length=cfg.trainer.seq_length,
        seed=cfg.seed,
        cache_dir=cache_dir,
        category=options.group_by,
    )
    split = options.split
    if split == "auto":
        split = "validation" if splits.validation is not None else "train"
    dataset = getattr(splits, split)
    if dataset is None:
        raise UserError(f"evaluate.split={split}: the data has no validation split; see data.validation_fraction")
    # In the order of the files; each once, whatever its weight.
    order = np.unique(dataset.order)[: options.limit]
    all_categories = dataset.store.categories()
    ids, masks, categories = [], [], []
    for index in order:
        conversation_ids, mask = dataset.store[int(index)]
        ids.append(conversation_ids)
        masks.append(mask)
        categories.append(all_categories[index])
    sources = dataset.store.sources[order].tolist()
    report = splits.report["rows"]
    if split == "validation":
        report = splits.report.get("validation_rows", report)
    return Conversations(ids, masks, categories, sources, split, report)


def last_answer(ids: np.ndarray, mask: np.ndarray) -> tuple[list[int], list[int]] | None:
    """Split a conversation at its last answer.

    Returns:
        The ids before the last supervised span, and the ids of that span; None where nothing is before
        it or nothing is trained.
    """
    supervised = np.flatnonzero(mask)
    if not len(supervised):
        return None
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    first = gaps[-1] + 1 if len(gaps) else 0
    start, end = int(supervised[first]), int(supervised[-1]) + 1
    if start == 0:
        return None
    return ids[:start].tolist(), ids[start:end].tolist()
