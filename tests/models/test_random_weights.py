"""Random weights that don't depend on the layout; of whole runs: tests/e2e/test_layouts.py."""

import torch

from posttrain.models import whole_parameters


def normal(tensor, *, generator):
    tensor.normal_(0, 0.02, generator=generator)


def filled(dtype, seed="1/words", shape=(64, 8)):
    whole = torch.full(shape, torch.nan, dtype=dtype)
    whole_parameters.draw(whole, seed, normal)
    return whole


def test_a_part_at_a_time(monkeypatch):
    """All rows, each part others, what fp32 would be rounded once; a row wider than a part too."""
    monkeypatch.setattr(whole_parameters, "DRAWN_AT_ONCE", 64)
    wide = filled(torch.float32)
    assert wide.isfinite().all() and len(wide.unique(dim=0)) == len(wide)
    assert abs(wide.std().item() / 0.02 - 1) < 0.1
    assert torch.equal(filled(torch.bfloat16), wide.to(torch.bfloat16))
    assert not torch.equal(filled(torch.float32, "2/words"), wide)
    assert filled(torch.float32, shape=(3, 100)).isfinite().all()
