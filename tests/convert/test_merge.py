"""Base + adapter as one model, against what PEFT makes of them."""

import json
import shutil
import sys

import pytest
import torch
from families import FAMILIES
from parity import unpacked_logits
from safetensors.torch import load_file, save_file

from posttrain.errors import UserError
from posttrain.peft import LoRA


def load(directory, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")


@pytest.fixture
def peft_adapter(tmp_path):
    """Make an adapter by PEFT itself, with random B; returns (directory, the adapted model)."""

    def make(base, **settings):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
                elif "magnitude" in name:
                    parameter.mul_(1.3)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", model.eval()

    return make


def test_a_sweep_names_its_best_trial(tmp_path):
    from posttrain.convert.checkpoints import find
    from posttrain.convert.merge import find_adapter
    from posttrain.generate.load import open_export

    (tmp_path / "multirun.yaml").write_text("hydra: {}")
    (tmp_path / "best").symlink_to("lr=0.1/adapter")
    said = rf"is a sweep; its best trial is {tmp_path}/lr=0\.1$"
    for refuse in (find, find_adapter):
        with pytest.raises(UserError, match=said):
            refuse(tmp_path)
    with pytest.raises(UserError, match=said), open_export(str(tmp_path)):
        pass


def test_what_has_no_adapter_says_why(base, tmp_path):
    from posttrain.convert.checkpoints import find
    from posttrain.convert.merge import find_adapter

    run = tmp_path / "a run"
    (run / "checkpoints" / "iter_0000002").mkdir(parents=True)
    export = rf"export one, and merge .*: python -m posttrain\.convert export '{run}"
    for path in (run, run / "checkpoints", run / "checkpoints" / "iter_0000002"):
        with pytest.raises(UserError, match=export):
            find_adapter(path)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "hf").symlink_to(base("llama"))
    for path in (whole, whole / "hf"):
        with pytest.raises(UserError, match=r"hf is a whole model already; there is nothing to merge"):
            find_adapter(path)
    with pytest.raises(UserError, match="is in Hugging Face's form already"):
        find(whole / "hf")
    with pytest.raises(UserError, match="there is no such directory"):
        find_adapter(tmp_path / "none")
    with pytest.raises(UserError, match="nor a run with an adapter/"):
        find_adapter(tmp_path)


def test_merged_in_another_dtype(base, peft_adapter, tmp_path):
    """Rounded once: from fp32 arithmetic, not from the base's bf16."""
    from posttrain.convert.merge import merge_adapter

    adapter, _ = peft_adapter(base("llama"), r=4, target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "fp32")
    merge_adapter(adapter, tmp_path / "bf16", dtype="bfloat16")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert all(rounded[name].equal(exact[name].bfloat16()) for name in exact)
    assert load(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"r": 4, "use_rslora": True, "target_modules": "all-linear"}),
        ("llama", {"r": 4, "alpha_pattern": {"q_proj": 32}, "rank_pattern": {"q_proj": 8},
                   "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "gate_proj"]}),
        ("llama", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}),
        ("llama", {"r": 4, "init_lora_weights": "gaussian", "use_rslora": True, "use_dora": True,
                   "rank_pattern": {r".*\.layers\.0\..*(q_proj|k_proj)": 8}, "target_modules": ["q_proj", "k_proj"]}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt_neox", {"r": 4, "target_modules": ["query_key_value", "dense_4h_to_h"]}),
    ],
)  # fmt: skip
def test_what_peft_makes(family, settings, base, peft_adapter, tmp_path):
    from peft import PeftModel

    from posttrain.convert.merge import merge_adapter
    from posttrain.peft.attach import attach_adapter

    directory = base(family)
    adapter, model = peft_adapter(directory, **settings)
    merge_adapter(adapter, tmp_path / "merged")
    assert (unpacked_logits(model) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4
    assert (unpacked_logits(model) - unpacked_logits(load(directory))).abs().max() > 0.1
    attached = attach_adapter(load(directory), adapter).eval()
    assert unpacked_logits(attached).equal(unpacked_logits(PeftModel.from_pretrained(load(directory), adapter).eval()))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_its_base(init, base, peft_adapter, tmp_path):
    """PEFT takes the first A and B off the base's weights each time; saved as plain LoRA it merges like any other."""
    from peft import LoraConfig, get_peft_model

    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=init, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(load(directory), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    expected = unpacked_logits(model.eval())
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match="init_lora_weights="):
        merge_adapter(tmp_path / "peft", tmp_path / "merged")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    merge_adapter(tmp_path / "plain", tmp_path / "merged")
    assert (expected - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4
    assert (expected - unpacked_logits(load(directory))).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}],
)
def test_what_only_peft_can_merge(settings, base, peft_adapter, tmp_path):
    """The refusal says how, and the model that this makes is one to continue with."""
    from peft import AutoPeftModelForCausalLM

    from posttrain.convert.merge import merge_adapter

    adapter, model = peft_adapter(base("llama"), r=4, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=r"not supported; LoRA, .*: AutoPeftModelForCausalLM\.from_pretrained\(DIR"):
        merge_adapter(adapter, tmp_path / "merged")
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (unpacked_logits(model) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4


def test_the_revision_that_is_read(base, peft_adapter, tmp_path):
    from posttrain.convert.merge import merge_adapter

    adapter, model = peft_adapter(base("llama"), r=4, target_modules=["q_proj"], revision="main")
    merge_adapter(adapter, tmp_path / "merged")
    assert (unpacked_logits(model) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4
    adapter, _ = peft_adapter(tmp_path / "base", r=4, target_modules=["q_proj"], revision="v2")
    with pytest.raises(UserError, match="revision=v2: not supported"):
        merge_adapter(adapter, tmp_path / "other")


def test_numbers_that_are_none(base, peft_adapter, tmp_path):
    from posttrain.convert.merge import merge_adapter

    adapter, _ = peft_adapter(base("llama"), r=4, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base(base, peft_adapter, tmp_path):
    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    weights = load_file(directory / "model.safetensors")
    weights = {name: tensor.to(torch.float8_e4m3fn) if "q_proj" in name else tensor for name, tensor in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj\.weight is stored as F8_E4M3"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_base_that_says_it_is_quantised(fields, method, known, base, peft_adapter, tmp_path):
    """Of a family that isn't known here as well."""
    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    if not known:
        fields = {**fields, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(UserError, match=rf"(quantization|compression)_config.*{method}"):
        merge_adapter(adapter, tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("stored", "said"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")])
def test_eight_bits_beside_the_adapted_layers(stored, said, base, peft_adapter, tmp_path):
    """In a family that isn't known; in another data type they would be numbers without their scales."""
    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    weights = load_file(directory / "model.safetensors")
    weights = {name: tensor.to(stored) if "v_proj" in name else tensor for name, tensor in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "olmo2"}))
    with pytest.raises(UserError, match=rf"v_proj.weight is quantised \({said}\)"):
        merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16")


def test_numbers_beyond_the_data_type(base, peft_adapter, tmp_path):
    """Finite in the adapter, infinite in the base's 16 bits: PEFT's safe merge refuses them as well."""
    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    halves = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(halves, directory / "model.safetensors", metadata={"format": "pt"})
    weights = {name: tensor * 1e4 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj.weight holds numbers that are not finite in torch.float16"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("copied", [True, False])
def test_an_adapted_output_layer_that_is_the_embedding(copied, base, peft_adapter, tmp_path):
    """Whether or not the file holds a copy of the embedding for it."""
    from posttrain.convert.merge import merge_adapter

    directory = base("llama32")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj", "lm_head"])
    if copied:
        weights = load_file(directory / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head of the base model is its embedding too"):
        merge_adapter(adapter, tmp_path / "merged")


def test_two_matrices_saved_for_one(base, peft_adapter, tmp_path):
    """PEFT saves a tied output matrix beside the embedding; where they differ one would be lost."""
    from posttrain.convert.merge import merge_adapter

    directory = base("llama32")
    adapter, model = peft_adapter(directory, r=4, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    weights["base_model.model.model.embed_tokens.weight"] = embedding
    for output in (embedding.clone(), embedding + 1):
        weights["base_model.model.lm_head.weight"] = output
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        if output.equal(embedding):
            merge_adapter(adapter, tmp_path / "merged")
            assert (unpacked_logits(model) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4
        else:
            with pytest.raises(UserError, match=r"lm_head\.weight differs from .*embed_tokens\.weight"):
                merge_adapter(adapter, tmp_path / "other")


def test_what_is_read_is_not_replaced(base, peft_adapter, tmp_path, monkeypatch, capsys):
    from posttrain.convert.__main__ import main

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    for out in (adapter, directory, tmp_path):
        words = [f"checkpoint={adapter}", f"convert.out={out}", "convert.overwrite=true"]
        monkeypatch.setattr(sys, "argv", ["convert", "merge", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "which is read, would be replaced" in capsys.readouterr().err
    assert (adapter / "adapter_config.json").is_file() and (directory / "model.safetensors").is_file()
    run = tmp_path / "run"
    adapter = shutil.move(adapter, run / "adapter")
    monkeypatch.setattr(sys, "argv", ["convert", "merge", str(run), str(adapter), "convert.overwrite=true"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "adapter, which is read, would be replaced" in capsys.readouterr().err
    assert (adapter / "adapter_config.json").is_file()


def test_an_adapted_output_layer_of_its_own(base, peft_adapter, tmp_path):
    from posttrain.convert.merge import merge_adapter

    adapter, model = peft_adapter(base("llama"), r=4, target_modules=["q_proj", "lm_head"])
    merge_adapter(adapter, tmp_path / "merged")
    assert (unpacked_logits(model) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4


def test_a_tokenizer_with_more_tokens_than_rows(base, peft_adapter, tmp_path):
    from tiny_tokenizer import byte_tokenizer

    from posttrain.convert.merge import merge_adapter

    tokenizer = byte_tokenizer()
    directory = base("llama", vocab_size=len(tokenizer))
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    tokenizer.save_pretrained(adapter)
    merge_adapter(adapter, tmp_path / "equal")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(adapter)
    with pytest.raises(
        UserError, match=rf"has a token {len(tokenizer) - 1}, the embedding only {len(tokenizer) - 1} rows"
    ):
        merge_adapter(adapter, tmp_path / "merged")
    tokenizer.save_pretrained(directory)  # as of models whose own tokenizer has tokens that they never see
    merge_adapter(adapter, tmp_path / "merged")


def test_a_moved_base(base, peft_adapter, tmp_path):
    """The message names the option that merge takes; with it the result is PEFT's."""
    from peft import PeftModel

    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    moved = directory.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"base: no such directory; say where it is with convert\.base=DIR$"):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(UserError, match=r"its base model \./nowhere: no such directory; say where"):
        merge_adapter(adapter, tmp_path / "merged", base_path="./nowhere")
    merge_adapter(adapter, tmp_path / "merged", base_path=str(moved))
    expected = PeftModel.from_pretrained(load(moved), adapter).merge_and_unload()
    assert (unpacked_logits(expected) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_own_adapters(family, megatron, base, tmp_path):
    from test_export import source

    from posttrain.convert.export import export_source
    from posttrain.convert.merge import merge_adapter

    live = source(base(family), LoRA(rank=4, alpha=8))
    export_source(live, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    from posttrain.convert import megatron_logits as logits

    tokens = logits.encode_prompts(live.model.load_tokenizer(), 96)
    expected, found = logits.compute_logits(live.parts, tokens), load(tmp_path / "merged")(tokens).logits
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


def test_arithmetic_is_fp32_and_the_dtype_is_the_bases(base, peft_adapter, tmp_path):
    from posttrain.convert.merge import merge_adapter, merge_weight

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    weights = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(adapter, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, before in weights.items():
        assert after[name].dtype == torch.bfloat16
        if "q_proj" not in name:
            assert after[name].equal(before)
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = parts[f"{stem}.lora_A.weight"], parts[f"{stem}.lora_B.weight"]
        exact = before.double() + 8 / 4 * b.double() @ a.double()
        assert (after[name].double() - exact).abs().max() <= exact.abs().max() * 2**-8
        assert merge_weight(before, a, b, 2.0).equal(after[name])


def test_shards(base, peft_adapter, tmp_path, monkeypatch):
    from posttrain.convert import shards
    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, model = peft_adapter(directory, r=4, target_modules=["q_proj"])
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (40_000,))
    merge_adapter(adapter, tmp_path / "merged")
    files = sorted(tmp_path.glob("merged/*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 45_000 for file in files)
    assert {file.stat().st_mode for file in files} == {(tmp_path / "merged" / "config.json").stat().st_mode}
    assert (unpacked_logits(model) - unpacked_logits(load(tmp_path / "merged"))).abs().max() < 1e-4


def test_what_does_not_belong_together(base, peft_adapter, tmp_path):
    from posttrain.convert.merge import merge_adapter

    directory = base("llama")
    adapter, _ = peft_adapter(directory, r=4, target_modules=["q_proj"])
    for other, message in (("gpt2", "not in the base model"), ("llama32", "another model")):
        base(other)
        with pytest.raises(UserError, match=message):
            merge_adapter(adapter, tmp_path / "merged")
    base("llama")
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cut short"):
        merge_adapter(adapter, tmp_path / "merged")
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))
