"""Continuing from a PEFT adapter."""

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file

from posttrain.errors import UserError
from posttrain.models import HFModel
from posttrain.peft import DoRA, LoRA


def started(model, adapter, directory):
    """A live model whose adapters were loaded from `directory`, as the trainer does it."""
    from posttrain.convert import megatron
    from posttrain.models.hf_adapter import read_adapter
    from posttrain.peft import adapter_checks, load_adapter

    adapter_checks.check(read_adapter(directory), adapter, directory)
    bridge, built = model.bridge(), adapter.build()
    built.start = lambda parts: load_adapter.load(bridge, parts, directory)
    return megatron.build(bridge, torch.float32, directory, load=True, adapter=built)


# DoRA adds magnitudes, which lie as B's rows do: the families whose rows lie differently.
CASES = [
    *((LoRA, family) for family in FAMILIES),
    *((DoRA, family) for family in ("llama", "gemma2", "gpt2", "gpt_neox")),
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_the_model_is_the_one_exported(kind, family, megatron, base, tmp_path):
    from test_export import source

    from posttrain.convert import megatron_logits
    from posttrain.convert.export import export_source

    before = source(base(family), kind(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in before.parts[0].named_parameters():
            if name.endswith("weight_magnitude"):
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    export_source(before, tmp_path / "adapter")
    model = HFModel(path=str(tmp_path / "adapter"))
    assert model.directory == tmp_path / "base"
    after = started(model, kind(rank=4, alpha=8), tmp_path / "adapter")
    tokens = megatron_logits.encode_prompts(model.load_tokenizer(), 96)
    assert megatron_logits.compute_logits(after, tokens).equal(megatron_logits.compute_logits(before.parts, tokens))


def test_hugging_faces_names(megatron, base, tmp_path):
    """An adapter of PEFT's own, with an A for each projection."""
    from parity import unpacked_logits
    from peft import LoraConfig, get_peft_model
    from test_merge import load

    from posttrain.convert.export import Source, export_source

    modules = ["q_proj", "v_proj", "gate_proj", "o_proj"]
    theirs = get_peft_model(load(base("llama")), LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    model, ours = HFModel(path=str(tmp_path / "adapter")), LoRA(rank=4, alpha=8, target_modules=modules)
    parts = started(model, ours, tmp_path / "adapter")
    export_source(Source(model, model.bridge(), parts, ours.build(), torch.float32, "cpu"), tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert unpacked_logits(theirs.eval()).isfinite().all()
    with pytest.raises(UserError, match=r"peft.target_modules"):
        started(model, LoRA(rank=4, alpha=8), tmp_path / "adapter")


def test_settings_that_differ(megatron, base, tmp_path):
    from test_export import source

    from posttrain.convert.export import export_source

    export_source(source(base("llama"), LoRA(rank=4, alpha=8)), tmp_path / "adapter")
    model = HFModel(path=str(tmp_path / "adapter"))
    for adapter, message in (
        (LoRA(rank=8), "peft.rank=4 peft.alpha=8"),
        (LoRA(rank=4, alpha=32), "peft.alpha=8"),
        (DoRA(rank=4, alpha=8), "choose peft=lora"),
        (LoRA(rank=4, alpha=8, target_modules=["linear_qkv"]), "target_modules"),
    ):
        with pytest.raises(UserError, match=message):
            started(model, adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] += 1
    save_file(tensors, weights)
    with pytest.raises(UserError, match="shares a matrix"):
        started(model, LoRA(rank=4, alpha=8), tmp_path / "adapter")
