"""Model cards: what is in them is what was found, and they survive a merge."""

import json

import pytest
from test_export import source

from posttrain.config.composition import compose
from posttrain.convert import card
from posttrain.convert.training_metadata import FILE, collect_facts
from posttrain.peft import LoRA


def trained(*words, step=10):
    """Facts of a run of ten steps that these words would make, of which one is exported."""
    cfg = compose(["model=hf", "model.path=owner/base", "data=alpaca", "data.path=/secret/place/my.json", *words])
    report = {
        "sha256": {"data.path": ["ab12"]},
        "train": {"conversations": 1200, "tokens": 9000, "supervised_tokens": 3000, "packed_sequences": 3},
    }
    results = {"steps": 10, "exported_step": step, "val_loss_before": 3.61, "val_loss_after": 0.37, "train_loss": None}
    return collect_facts(cfg, results, report)


def test_an_adapters_card_and_the_merged_models(megatron, base, tmp_path):
    from huggingface_hub import ModelCard

    from posttrain.convert.export import export_source
    from posttrain.convert.merge import merge_adapter

    live = source(base("llama"), LoRA(rank=4, alpha=8))
    live.facts = trained("peft.rank=4", "trainer.license=apache-2.0")
    export_source(live, tmp_path / "run" / "adapter")
    found = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    assert found.data.base_model == "owner/base" and found.data.library_name == "peft"
    assert found.data.license == "apache-2.0" and {"lora", "sft"} <= set(found.data.tags)
    text = found.content
    for words in ("# run", "LoRA of rank 4", "`my.json`", "ab12", "1,200 conversations", "| val_loss_after | 0.37 |",
                  "Licence: apache-2.0", "AutoPeftModelForCausalLM", "| optimizer.lr |"):  # fmt: skip
        assert words in text, words
    assert "secret" not in text and str(tmp_path) not in text and "train_loss" not in text
    report = json.loads((tmp_path / "run" / "adapter" / "verification.json").read_text())["logits"]
    assert f"is {report['difference']:.2g}, at most 0.0001 was allowed" in text
    merge_adapter(tmp_path / "run", tmp_path / "merged", license="mit")
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.library_name == "transformers" and merged.data.license == "mit"
    assert "ab12" in merged.content and "were not compared with anything" in merged.content
    assert json.loads((tmp_path / "merged" / FILE).read_text())["license"] == "mit"


@pytest.mark.parametrize(
    "step, said", [(10, " (step 10)"), (4, " (step 4 of 10, which has the lowest validation loss)")]
)
def test_the_step_of_an_export_is_said(tmp_path, step, said):
    assert card.with_step(tmp_path) == str(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(trained(step=step)))
    assert card.with_step(tmp_path) == f"{tmp_path}{said}"


def test_a_base_in_the_hubs_cache_has_its_hubs_name(tmp_path):
    assert trained()["base"] == "owner/base"
    assert trained(f"model.path={tmp_path}/base")["base"] == "base"
    assert trained(f"model.path={tmp_path}/models--owner--base/snapshots/0a1b")["base"] == "owner/base"


def test_what_is_not_known_is_said(megatron, base, tmp_path):
    from huggingface_hub import ModelCard

    from posttrain.convert.export import export_source

    live = source(base("llama"))
    live.unchecked = "convert.verify=false"
    export_source(live, tmp_path / "hf")
    found = ModelCard.load(tmp_path / "hf" / "README.md")
    assert found.data.license == "unknown" and found.data.base_model is None
    assert "Licence: unknown; name it" in found.content and "nothing says how it was trained" in found.content
    assert "were not compared with the trained model's: convert.verify=false" in found.content
    assert not (tmp_path / "hf" / FILE).exists()


def test_hub_data_and_local_bases(tmp_path):
    about = trained("data.path=hf://owner/set:part@train", "model.path=/somewhere/private/base", "peft=none")
    assert about["base"] == "base" and about["method"] == "all weights"
    card.write_card(tmp_path, "name", about)
    text = (tmp_path / "README.md").read_text()
    assert "datasets:\n- owner/set\n" in text and "base_model" not in text and "private" not in text
