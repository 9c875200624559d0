"""The objective of docs/objectives.md, as a user adds it."""

import sys
from pathlib import Path

import numpy as np
import torch

from posttrain.cli.command import compose
from posttrain.config.instantiate import built
from posttrain.spec.checks import check_objective
from posttrain.train.batches import Collate

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def row(*masks):
    """A packed sequence of conversations with these masks."""
    mask = np.concatenate(masks).astype(np.uint8)
    ids = np.arange(len(mask), dtype=np.int32)
    lengths = np.array([len(one) for one in masks], np.int32)
    return {"input_ids": ids, "labels": ids, "loss_mask": mask, "position_ids": ids, "seq_lens": lengths}


def test_each_conversation_counts_the_same(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "length_normalized")
    cfg = compose([f"hydra.searchpath=[file://{EXAMPLES}/conf]", "objective=length_normalized"])
    check_objective(cfg, built(cfg.data))
    objective = built(cfg.objective)
    rows = [row([0, 1, 1, 0], [0, 0, 0], [1, 1, 1, 1, 0]), row([0, 1])]
    batch = Collate(12, 0, objective.weights)(rows)
    losses = torch.arange(24, dtype=torch.float32)[None]
    total = (batch["loss_mask"] * losses).sum()
    means = [np.mean([1, 2]), np.mean([7, 8, 9, 10]), 13.0]  # by hand
    assert int(batch["normalizer"]) == 3
    assert np.isclose(float(total) / 3, np.mean(means))
    selected = losses[:, batch["supervised_at"]]
    assert torch.isclose((batch["supervised_mask"] * selected).sum(), total)
    del sys.modules["length_normalized"]
