"""A template with more tokens than the model has rows: the embedding grows, and nothing of it is lost."""

import json

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from test_export import base_without_chats, llama3, source

from posttrain.models import HFModel
from posttrain.models.vocabulary import grown, is_vocabulary
from posttrain.peft import LoRA

pytestmark = pytest.mark.nightly

# Family -> whether its embedding is its output matrix.
OWN = {family: bool(fields.get("tie_word_embeddings", family == "gpt2")) for family, (_, fields) in FAMILIES.items()}


@pytest.mark.every_run
def test_new_rows():
    """Like the old ones, the same each time, and none like another; the old ones are as they were."""
    torch.manual_seed(0)
    weight = 3 + 2 * torch.randn(10_000, 8)
    found = grown(weight, 11_000)
    assert found[:10_000].equal(weight) and found.equal(grown(weight, 11_000)) and grown(weight, 9).equal(weight)
    new = found[10_000:]
    assert (new.mean(0) - 3).abs().max() < 0.3 and (new.std(0) - 2).abs().max() < 0.3
    assert len(new.unique(dim=0)) == 1000
    assert grown(weight.bfloat16(), 10_003).dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "tied"), [*OWN.items(), ("llama", True), ("qwen3", False)])
def test_whole_model_adapter_and_merge(family, tied, megatron, base, tmp_path):
    """Transformers and PEFT read each, in the card's lines, as the live model; the old rows are the base's."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.convert import megatron_logits as logits
    from posttrain.convert.export import export_source
    from posttrain.convert.merge import merge_adapter

    directory = base_without_chats(base, family=family, tie_word_embeddings=tied)
    before = load_file(directory / "model.safetensors")
    live = source(directory, template=llama3())
    export_source(live, tmp_path / "hf")
    tokens = logits.encode_prompts(live.tokenizer.tokenizer, 272, live.tokenizer.conversation)
    assert tokens.max() == 271
    expected = logits.compute_logits(live.parts, tokens)
    assert expected.shape[-1] == 272
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert close(model(tokens).logits, expected)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 272
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == before.keys()
    matrices = [name for name in before if is_vocabulary(name)]
    assert len(matrices) == 2 - tied
    for name in matrices:
        assert after[name][:269].equal(before[name]) and len(after[name]) == 272

    live = source(directory, LoRA(rank=4, alpha=8), template=llama3())
    export_source(live, tmp_path / "adapter")
    expected = logits.compute_logits(live.parts, tokens)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    assert close(model(tokens).logits, expected)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.config.vocab_size == 272 and close(merged(tokens).logits, expected)
    for name in ("hf", "adapter"):
        assert json.loads((tmp_path / name / "verification.json").read_text())["logits"]["checked"]


def close(found, expected):
    return (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_going_on_from_a_grown_adapter(megatron, base, tmp_path):
    """Its embedding is the model's, even where it was trained; what PEFT itself saves is read too."""
    from peft import AutoPeftModelForCausalLM

    from posttrain.convert import megatron as convert
    from posttrain.convert import megatron_logits as logits
    from posttrain.convert.export import export_source
    from posttrain.generate.live_model import load_model
    from posttrain.peft import load_adapter

    export_source(source(base_without_chats(base), LoRA(rank=4, alpha=8), template=llama3()), tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix[269:] += torch.randn(3, matrix.shape[1])
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    for file in (tmp_path / "adapter").glob("*token*"):
        (tmp_path / "peft" / file.name).write_bytes(file.read_bytes())
    again = HFModel(path=str(tmp_path / "peft"))
    assert again.hf_config().vocab_size == 272
    bridge, adapter = again.bridge(), LoRA(rank=4, alpha=8).build()
    parts = convert.build(bridge, torch.float32, tmp_path, load=True, adapter=adapter)
    load_adapter.load(bridge, parts, tmp_path / "peft")
    tokens = torch.arange(240, 272)[None]
    assert close(logits.compute_logits(parts, tokens), model.eval()(tokens).logits)
    loaded, _ = load_model(tmp_path / "peft")
    assert close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.every_run
def test_padding_takes_no_part_in_the_softmax(megatron, base):
    """As tensor parallelism pads: the logits of the tokens are as they were, the others weigh nothing."""
    from posttrain.convert import megatron_logits as logits
    from posttrain.models.padding import hide_padding

    live = source(base("gpt2"))
    tokens = torch.arange(30)[None]
    expected = logits.compute_logits(live.parts, tokens)
    hide_padding(live.parts, 90)
    found = logits.compute_logits(live.parts, tokens)
    assert found[..., :90].equal(expected[..., :90])
    assert found.softmax(-1)[..., :90].equal(expected[..., :90].softmax(-1)) and not found.softmax(-1)[..., 90:].any()


@pytest.mark.every_run
def test_a_model_that_is_not_its_files_is_refused_before_training(megatron, base):
    """Logits of a whole model as loaded against transformers on the files given; said where they aren't compared."""
    from posttrain.convert.export import check_base
    from posttrain.errors import ExportRefused

    live = source(base_without_chats(base), template=llama3())
    found = check_base(live)
    assert found["checked"] and found["difference"] <= found["tolerance"]
    live.unchecked = "trainer.verify=false"
    assert check_base(live) == {"checked": False, "reason": "trainer.verify=false"}
    live.unchecked = None
    with torch.no_grad():
        next(p for name, p in live.parts[0].named_parameters() if "linear_fc2" in name).mul_(1.01)
    with pytest.raises(ExportRefused, match=r"as it was loaded differ by .* from those of transformers"):
        check_base(live)


@pytest.mark.every_run
def test_a_prompt_is_longer_than_windows_and_the_original_context(megatron, base, tmp_path):
    """A wrong window shows in the long prompt alone; what it is too short for is said."""
    from transformers import AutoConfig

    from posttrain.convert import long_prompt
    from posttrain.convert.export import check_base
    from posttrain.errors import ExportRefused

    directory = base_without_chats(base, family="mistral", sliding_window=48, max_position_embeddings=128)
    live = source(directory)
    found = check_base(live)
    assert found["checked"] and found["longest_prompt"] == 96 and "not_seen" not in found
    for layer in live.parts[0].decoder.layers:
        layer.self_attention.core_attention.window = None
    with pytest.raises(ExportRefused, match="as it was loaded differ"):
        check_base(live)

    large = AutoConfig.for_model("mistral", vocab_size=32000, sliding_window=4096)
    assert long_prompt.plan(large, "cpu") == long_prompt.LongPrompt(0, {"sliding window": 4096})
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        rope_parameters={**rope, "rope_theta": 1e4, "original_max_position_embeddings": 64},
    )  # fmt: skip
    assert long_prompt.plan(config, "cpu") == long_prompt.LongPrompt(96, {})


@pytest.mark.every_run
def test_an_adapter_starts_from_a_model_that_is_its_files(megatron, base):
    from posttrain.convert.export import check_base

    live = source(base_without_chats(base), LoRA(rank=4, alpha=8))
    for name, parameter in live.parts[0].named_parameters():
        if "linear_out" in name:
            parameter.data.zero_()
    assert check_base(live)["checked"]
