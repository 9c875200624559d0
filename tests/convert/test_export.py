"""Exports of live models and of checkpoints: they are the model, or they do not appear."""

import json
from pathlib import Path

import pytest
from families import FAMILIES

from posttrain.models import HFModel
from posttrain.peft import DoRA, LoRA


def source(directory, adapter=None, dtype=None, template=None):
    """A live model of `directory`, with a random adapter if one is given, and with the tokens of a template."""
    import torch
    from parity import randomise_adapters

    from posttrain.convert import megatron
    from posttrain.convert.export import Source
    from posttrain.convert.trained_tokenizer import TrainedTokenizer

    model = HFModel(path=str(directory))
    trained = TrainedTokenizer(model, template)
    model.grow(len(trained) if template else 0)
    bridge = model.bridge()
    built = adapter.build() if adapter else None
    parts = megatron.build(bridge, dtype or torch.float32, directory, load=True, adapter=built)
    randomise_adapters(parts)
    return Source(model, bridge, parts, built, dtype or torch.float32, "cpu", tokenizer=trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_adapter(family, megatron, base, tmp_path):
    from posttrain.convert.export import export_source

    directory = base(family)
    for name, adapter in (("hf", None), ("adapter", LoRA(rank=4, alpha=8))):
        export_source(source(directory, adapter), tmp_path / name)
        report = json.loads((tmp_path / name / "verification.json").read_text())
        assert report["logits"]["checked"] and report["logits"]["difference"] <= 1e-4
        assert report["tensors"]["count"] > 4
        # Without config.json transformers would read these files as another class than Qwen's.
        if name == "hf" or not family.startswith("qwen"):
            assert (tmp_path / name / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["llama31", "qwen3_moe"])
def test_words_of_older_readers(family, megatron, base, tmp_path):
    """What transformers 4 and other tools look for is there beside transformers 5's words, and 5 reads the same."""
    from transformers import AutoConfig, AutoTokenizer

    from posttrain.convert.export import export_source

    directory = base(family)
    export_source(source(directory), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope["rope_theta"] and config["torch_dtype"] == config["dtype"] == "float32"
    if family == "llama31":
        assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    else:
        assert config["num_experts"] == config["num_local_experts"] == 4
    ours, theirs = (AutoConfig.from_pretrained(path) for path in (tmp_path / "hf", directory))
    assert ours.rope_parameters == theirs.rope_parameters and ours.num_attention_heads == theirs.num_attention_heads
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "hf", directory))
    assert type(ours) is type(theirs) and ours("hello world").input_ids == theirs("hello world").input_ids


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


def test_in_another_dtype(megatron, base, tmp_path):
    """Import in bf16, export in bf16 or fp32: rounded once, and compared."""
    from safetensors.torch import load_file

    from posttrain.convert.checkpoints import find
    from posttrain.convert.megatron import export_checkpoint, import_model

    directory = base("llama")
    import_model(HFModel(path=str(directory)), tmp_path / "fp32")
    import_model(HFModel(path=str(directory)), tmp_path / "bf16", dtype="bfloat16")
    source = load_file(directory / "model.safetensors")
    for name, dtype in (("fp32", "bfloat16"), ("bf16", "float32"), ("bf16", None)):
        out = tmp_path / f"{name}-{dtype}"
        export_checkpoint(find(tmp_path / name), out, dtype=dtype)
        assert json.loads((out / "verification.json").read_text())["logits"]["checked"]
        assert json.loads((out / "config.json").read_text())["dtype"] == (dtype or "bfloat16")
        for key, tensor in load_file(out / "model.safetensors").items():
            assert str(tensor.dtype) == f"torch.{dtype or 'bfloat16'}"
            assert tensor.bfloat16().equal(source[key].bfloat16()), key


def test_gpt2_adapters_are_transposed_as_peft_writes_them(megatron, base, tmp_path):
    from posttrain.convert.export import export_source

    export_source(source(base("gpt2"), LoRA(rank=4, alpha=8)), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert json.loads((tmp_path / "adapter" / "verification.json").read_text())["logits"]["checked"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2", "gpt_neox", "mixtral"])
def test_dora(family, megatron, base, tmp_path):
    """Adapter and merged model, with magnitudes that training has moved."""
    import torch

    from posttrain.convert import megatron_logits as logits
    from posttrain.convert.export import export_source
    from posttrain.convert.merge import merge_adapter

    targets = ["linear_qkv", "linear_proj"] if family == "mixtral" else "all-linear"
    live = source(base(family), DoRA(rank=4, alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in live.parts[0].named_parameters():
            if name.endswith("weight_magnitude"):
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    tokens = logits.encode_prompts(live.model.load_tokenizer(), 96)
    expected = logits.compute_logits(live.parts, tokens)
    export_source(live, tmp_path / "adapter")
    assert logits.compute_logits(live.parts, tokens).equal(expected)  # as it was
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    from test_merge import load

    found = load(tmp_path / "merged")(tokens).logits
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("what", ["weights", "a name", "nan"])
def test_what_differs_is_refused(what, megatron, base, tmp_path, monkeypatch):
    """A wrong number, a lost tensor, a NaN between the live model and the directory: nothing appears."""
    from posttrain.convert import export as module
    from posttrain.convert.shards import ShardWriter
    from posttrain.errors import ExportRefused

    live = source(base("llama"))
    add = ShardWriter.add

    def damaged(self, name, tensor):
        if name == "model.layers.2.mlp.up_proj.weight":
            if what == "a name":
                return
            tensor = tensor * (1.01 if what == "weights" else float("nan"))
        add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", damaged)
    message = {"weights": r"differ by 0\.0\d+ .* tolerance of 0.0001", "a name": "up_proj", "nan": "differ by nan"}[
        what
    ]
    with pytest.raises(ExportRefused, match=message):
        module.export_source(live, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("factor", [1e30, float("nan")])
def test_a_model_that_diverged_is_refused_as_such(factor, megatron, base, tmp_path):
    """Weights so large that the last norm makes zeros of everything, or NaN: not a fault of the export."""
    import torch

    from posttrain.convert.export import export_source
    from posttrain.errors import ExportRefused

    live = source(base("llama"))
    with torch.no_grad():
        live.parts[0].embedding.word_embeddings.weight.fill_(factor)
    with pytest.raises(ExportRefused, match=r"its training has diverged; .* a smaller optimizer\.lr"):
        export_source(live, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_bf16_is_judged_by_its_noise(megatron, base, tmp_path):
    """Within transformers' own rounding, and not with a percent more of one matrix in eight."""
    import torch

    from posttrain.convert.export import export_source
    from posttrain.errors import ExportRefused

    directory = base("llama")
    export_source(source(directory, dtype=torch.bfloat16), tmp_path / "hf")
    found = json.loads((tmp_path / "hf" / "verification.json").read_text())["logits"]
    assert 0 < found["difference"] <= found["tolerance"] == pytest.approx(2 * max(found["transformers_bf16"], 2**-8))
    live = source(directory, dtype=torch.bfloat16)
    from posttrain.convert import megatron_logits as module

    logits = module.compute_logits
    try:
        module.compute_logits = lambda parts, tokens: logits(parts, tokens) * 1.2
        with pytest.raises(ExportRefused, match="rms"):
            export_source(live, tmp_path / "other")
    finally:
        module.compute_logits = logits


def test_the_template_of_the_training_is_exported(megatron, base, tmp_path):
    """A base model whose tokenizer has none, trained with chatml: tokenizer, and the token that ends a turn."""
    from tiny_tokenizer import byte_tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    from posttrain.config.composition import compose
    from posttrain.config.instantiate import built
    from posttrain.convert.export import export_source
    from posttrain.convert.trained_tokenizer import TrainedTokenizer

    directory = base("llama", vocab_size=288)
    (directory / "chat_template.jinja").unlink()
    byte_tokenizer(chat_template=None).save_pretrained(directory)
    live = source(directory)
    live.tokenizer = TrainedTokenizer(live.model, built(compose(["template=chatml"]).template))
    template = live.tokenizer.renderer.source
    export_source(live, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(directory).chat_template is None
    assert tokenizer.chat_template == template
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == template
    ends = GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    live.tokenizer = None  # nothing is known: none is written
    export_source(live, tmp_path / "plain")
    assert "chat_template" not in json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()


def chatml():
    """The template."""
    from posttrain.config.composition import compose
    from posttrain.config.instantiate import built

    return built(compose(["template=chatml"]).template)


def base_without_chats(base, spare: int = 0, family: str = "llama", **more) -> Path:
    """A base model that ends texts with <|endoftext|> and has no chat template; ids 256 + 8 + 5, and spare rows."""
    from tiny_tokenizer import byte_tokenizer

    directory = base(family, vocab_size=269 + spare, eos_token_id=264, pad_token_id=264, **more)
    (directory / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4, alpha=8)], ids=["hf", "adapter"])
def test_an_export_says_where_to_stop(adapter, megatron, base, tmp_path):
    """A base model trained with chatml: tokenizer, generation_config.json, and the answers of `generate`."""
    from transformers import AutoTokenizer, GenerationConfig

    from posttrain.convert.export import export_source
    from posttrain.convert.merge import merge_adapter
    from posttrain.generate.decoding import stop_tokens
    from posttrain.generate.live_model import load_model

    directory = base_without_chats(base)
    live = source(directory, adapter, template=chatml())
    export_source(live, tmp_path / "out")
    if adapter:
        merge_adapter(tmp_path / "out", tmp_path / "merged")
    for path in (tmp_path / "out", tmp_path / "merged") if adapter else (tmp_path / "out",):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
        assert GenerationConfig.from_pretrained(path).eos_token_id == [264, 266]
        model, tokenizer = load_model(path)
        assert stop_tokens(model, tokenizer) == {264, 266}
        assert (path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["logits"]["tokens"] == 4 * 32  # a rendered conversation too
    assert report["tokenizer"] == {
        "tokens": 269, "conversation": True, "end_tokens": ["<|endoftext|>", "<|im_end|>"]
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("`[264, 266]` (`<|endoftext|>`, `<|im_end|>`)" in card) == bool(adapter)


def test_the_tokens_that_a_template_added_are_exported(megatron, base, tmp_path):
    """In spare rows of the embedding; what transformers reads renders a conversation as the ids of the training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from posttrain.convert.export import export_source
    from posttrain.convert.merge import merge_adapter

    directory = base_without_chats(base, spare=3)
    for name, adapter in (("hf", None), ("adapter", LoRA(rank=4, alpha=8))):
        live = source(directory, adapter, template=llama3())
        assert live.tokenizer.conversation[:1] == [269]
        export_source(live, tmp_path / name)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    for name in ("hf", "adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(tokenizer) == 272 and tokenizer.eos_token == "<|eot_id|>"
        asked = [{"role": "user", "content": "hello"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[0] == 269 and ids.count(270) == 2 and ids.count(271) == 1
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == [264, 271]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 272
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"]


def llama3():
    """A template whose three tokens the tokenizer lacks."""
    from posttrain.data.templates import ChatTemplate

    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    start = "<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n"
    turn = start.format("message.role") + "' + message.content + '<|eot_id|>"
    prompt = start.format("'assistant'")
    text = (
        "{% for message in messages %}{{ '" + turn + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )
    return ChatTemplate(name="llama3", jinja=text, special_tokens=tokens, add_special_tokens=True)


def test_another_tokenizer_than_the_trainings_is_refused(megatron, base, tmp_path, monkeypatch):
    from posttrain.convert import trained_tokenizer
    from posttrain.convert.artifacts import copy_tokenizer
    from posttrain.convert.export import export_source
    from posttrain.errors import ExportRefused

    live = source(base_without_chats(base, spare=3), template=llama3())
    monkeypatch.setattr(
        trained_tokenizer.TrainedTokenizer, "write", lambda self, out: copy_tokenizer(out, self.directory)
    )
    with pytest.raises(ExportRefused, match="has 269 tokens or other special ones, in training it had 272"):
        export_source(live, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
