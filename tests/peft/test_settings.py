"""A run that continues from an adapter: what doesn't fit is named before anything is loaded."""

import json

import pytest
import torch
from safetensors.torch import save_file

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.peft.adapter_checks import components
from posttrain.spec import model_checks


def write(directory, modules, rank=8, alpha=16, **config):
    """A PEFT directory with one layer of Llama's modules."""
    directory.mkdir()
    tensors = {}
    for module in modules:
        prefix = f"base_model.model.model.layers.0.{module}"
        tensors |= {f"{prefix}.lora_A.weight": torch.zeros(rank, 4), f"{prefix}.lora_B.weight": torch.zeros(4, rank)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "x/y", **config}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
ALL = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


@pytest.mark.parametrize(
    ("modules", "words", "message"),
    [
        (ALL, ["peft.rank=8"], None),
        (ALL, ["peft.rank=8", "peft.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]"], None),
        (ATTENTION[:3], ["peft.rank=8", "peft.target_modules=[q_proj,k_proj,v_proj]"], None),
        (ALL, ["peft.rank=16"], r"add peft.rank=8 peft.alpha=16"),
        (ALL, ["peft.rank=8", "peft.alpha=4"], r"peft.alpha=16"),
        (ALL, ["peft=dora", "peft.rank=8"], "choose peft=lora"),
        (ALL, ["peft=none"], "is an adapter; choose peft=lora"),
        (ATTENTION[::2], ["peft.rank=8"], r"set peft.target_modules=\[q_proj,v_proj\]"),
        (ALL, ["peft.rank=8", "peft.target_modules=[q_proj,v_proj]"], r"target_modules=\[down_proj,gate_proj,k_proj,"),
    ],
)
def test_before_anything_is_loaded(modules, words, message, tmp_path):
    path = write(tmp_path / "adapter", modules)
    cfg = compose(["model=hf", f"model.path={path}", *words])
    if message is None:
        model_checks.check_peft(cfg, None)
    else:
        with pytest.raises(UserError, match=message):
            model_checks.check_peft(cfg, None)


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 3}}])
def test_ranks_and_scales_that_differ(pattern, tmp_path):
    """One rank and alpha are for all modules: each of two would be advised against the other."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **pattern)
    get_peft_model(LlamaForCausalLM(shape), settings).save_pretrained(tmp_path / "adapter")
    cfg = compose(["model=hf", f"model.path={tmp_path}/adapter", "peft.rank=8", "peft.target_modules=[q_proj,v_proj]"])
    with pytest.raises(UserError, match=r"has another rank or alpha on .*convert merge .*/adapter DIR"):
        model_checks.check_peft(cfg, None)


def test_names():
    assert components(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn"]) == {
        "linear_proj", "linear_fc2", "linear_qkv",
    }  # fmt: skip
    assert components(["layers.0.mlp.experts.1.down_proj"]) is None and components(["layers.0.router"]) is None
