"""Exports of live models and of checkpoints: they are the model, or they do not appear."""

import json

import pytest
from families import FAMILIES

from posttrain.models import HFModel
from posttrain.peft import LoRA


def source(directory, adapter=None, dtype=None):
    """A live model of `directory`, with a random adapter if one is given."""
    import torch
    from parity import randomise_adapters

    from posttrain.convert import megatron
    from posttrain.export import Source

    model = HFModel(path=str(directory))
    bridge = model.bridge()
    built = adapter.build() if adapter else None
    parts = megatron.build(bridge, dtype or torch.float32, load=True, adapter=built)
    randomise_adapters(parts)
    return Source(model, bridge, parts, built, dtype or torch.float32, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_adapter(family, megatron, base, tmp_path):
    from posttrain.export import export

    directory = base(family)
    for name, adapter in (("hf", None), ("adapter", LoRA(rank=4, alpha=8))):
        export(source(directory, adapter), tmp_path / name)
        report = json.loads((tmp_path / name / "verification.json").read_text())
        assert report["logits"]["checked"] and report["logits"]["difference"] <= 1e-4
        assert report["tensors"]["count"] > 4
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_is_bit_identical(family, megatron, base, tmp_path):
    from safetensors.torch import load_file

    from posttrain.convert.checkpoints import find
    from posttrain.convert.megatron import export_checkpoint, import_model

    directory = base(family)
    import_model(HFModel(path=str(directory)), tmp_path / "megatron")
    export_checkpoint(find(tmp_path / "megatron"), tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.equal(after[name]), name
