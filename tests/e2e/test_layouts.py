"""Layouts that need more than two processes of a CPU, or a mixture of experts: the losses of one process.

Others on a CPU: test_runs.py. On GPUs: test_gpu_layouts.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from posttrain.config import yaml_file

pytestmark = pytest.mark.nightly

LLAMA = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 288,
         "max_position_embeddings": 256, "tie_word_embeddings": False}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 48}  # the output layer is more than one: pp2 has 3 layers and 1
PROCESSES = {"tp2_pp2": 4}  # else two
FULL = ["peft=none", "trainer.export=false", "checkpoint.save=false"]


def save(directory, tiny, kind, **sizes):
    """A random model with the small tokenizer; returns the words of a short run of all its weights."""
    import transformers
    from tiny_tokenizer import byte_tokenizer

    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(**{**LLAMA, **sizes}, **experts, bos_token_id=None)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return [
        "model=hf", f"model.path={directory}", "data=messages", f"data.path={tiny / 'data.jsonl'}",
        "data.validation_fraction=0.1", "trainer.seq_length=128", "trainer.global_batch_size=4", "trainer.max_steps=4",
        "trainer.num_generations=0", "optimizer.lr=1e-3", "scheduler=constant", *FULL,
    ]  # fmt: skip


def losses(posttrain, *words):
    result = posttrain(*words)
    assert result.code == 0, result.err + result.log()
    return [*result.losses, result.summary["val_loss_after"]]


@pytest.mark.parametrize(("kind", "layouts"), [("Llama", ["tp2_pp2", "fsdp"]), ("Mixtral", ["ep2", "fsdp"])])
def test_on_a_cpu(kind, layouts, posttrain, tiny, tmp_path):
    words = save(tmp_path / "model", tiny, kind, **SMALL)
    alone = losses(posttrain, *words)
    for layout in layouts:
        divided = [f"parallelism={layout}", f"parallelism.nproc_per_node={PROCESSES.get(layout, 2)}"]
        assert losses(posttrain, *words, *divided) == pytest.approx(alone, rel=1e-5), layout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mixture_resumes_with_other_expert_parallel_sizes(precision, posttrain, tiny, tmp_path):
    """Divided experts have an optimizer of their own, and random states of every process."""
    words = [word for word in save(tmp_path / "model", tiny, "Mixtral", **SMALL) if word != "checkpoint.save=false"]
    words.append(f"precision={precision}")
    sizes = {
        "one": [],
        "ep2": ["parallelism=ep2"],
        "ep4": ["parallelism=ep2", "parallelism.expert_model_parallel_size=4"],
    }
    whole = losses(posttrain, *words)
    changes = [("one", "ep2"), ("ep2", "one"), ("ep2", "ep4")]
    for before, after in changes[: 3 if precision == "fp32" else 2]:
        run_dir = tmp_path / f"{before}-{after}"
        half = posttrain(*words, *sizes[before], "trainer.max_steps=2", run_dir=run_dir)
        assert half.code == 0, half.err + half.log()
        resumed = posttrain(*words, *sizes[after], run_dir=run_dir)
        assert resumed.code == 0, resumed.err + resumed.log()
        assert "resuming after step 2" in resumed.out
        found = [*resumed.losses, resumed.summary["val_loss_after"]]
        assert found == pytest.approx(whole, rel=1e-5 if precision == "fp32" else 2e-3), (before, after)


def test_master_weights_start_from_rounded_ones(posttrain, tiny, tmp_path):
    """A file in fp32, trained in bf16: steps of 1e-5 change a weight of 0.02 after some of them in every layout."""
    words = save(tmp_path / "model", tiny, "Llama", hidden_size=256, intermediate_size=512)
    words += ["precision=bf16", "optimizer.lr=1e-5"]
    alone = losses(posttrain, *words)
    divided = ["parallelism=fsdp", "parallelism.nproc_per_node=2"]
    assert losses(posttrain, *words, *divided) == pytest.approx(alone, rel=2e-4)


@pytest.mark.parametrize("rows", [["trainer.micro_batch_size=2"], ["data.packing=false"]])
def test_an_epochs_last_step_in_a_pipeline(rows, posttrain, tiny, tmp_path):
    """Micro-batches of padding, in part and in whole; of two rows, or of other lengths each."""
    words = save(tmp_path / "model", tiny, "Llama", **SMALL)
    words = [word for word in words if not word.startswith("trainer.max_steps")]
    words += ["trainer.epochs=1", "trainer.global_batch_size=8", *rows]
    alone = losses(posttrain, *words)
    assert losses(posttrain, *words, "parallelism=pp2") == pytest.approx(alone, rel=1e-5)


def test_layers_that_the_stages_do_not_divide(posttrain, tiny, tmp_path):
    """Nine on two and on four stages: one process's losses and export, and a save that one process resumes from."""
    words = save(tmp_path / "model", tiny, "Llama", **SMALL, num_hidden_layers=9)
    words = [word for word in words if word not in ("trainer.export=false", "checkpoint.save=false")]
    alone = posttrain(*words)
    assert alone.code == 0, alone.err + alone.log()
    exported = load_file(alone.run_dir / "hf" / "model.safetensors")
    for pipeline, stages in ((2, [5, 4]), (4, [2, 3, 3, 1])):
        layout = ["parallelism=pp2", f"parallelism.pipeline_model_parallel_size={pipeline}"]
        half = posttrain(*words, *layout, "trainer.max_steps=2", "trainer.export=false")
        assert half.code == 0, half.err + half.log()
        assert yaml_file.read(half.run_dir / "spec.yaml")["processes"]["stage_layers"] == stages
        copy = shutil.copytree(half.run_dir, tmp_path / f"pp{pipeline}")
        for run_dir, then in ((half.run_dir, layout), (copy, [])):
            result = posttrain(*words, *then, run_dir=run_dir)
            assert result.code == 0, result.err + result.log()
            assert "resuming after step 2" in result.out
            assert result.losses == pytest.approx(alone.losses, rel=1e-5)
            assert result.summary["val_loss_after"] == pytest.approx(alone.summary["val_loss_after"], rel=1e-5)
            found = load_file(run_dir / "hf" / "model.safetensors")
            assert found.keys() == exported.keys()
            for name, tensor in exported.items():
                assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-5), name


def test_stages_of_a_family_without_a_record(posttrain, tiny, tmp_path):
    """Only Megatron knows how many layers it has, and nobody what its output layer costs."""
    words = save(tmp_path / "seven", tiny, "Nemotron", **SMALL, head_dim=8, num_hidden_layers=7)
    alone = losses(posttrain, *words)
    assert losses(posttrain, *words, "parallelism=pp2") == pytest.approx(alone, rel=1e-5)
    words = save(tmp_path / "one", tiny, "Nemotron", **SMALL, head_dim=8, num_hidden_layers=1)
    refused = posttrain(*words, "parallelism=pp2")
    assert refused.code == 2 and "each stage needs a layer, of which the model has 1" in refused.err
    assert "Traceback" not in refused.err


def test_random_weights_are_the_same_however_they_are_divided(posttrain, tiny, tmp_path):
    """The base's as the adapters': gated and tied matrices, experts; 269 rows of embedding are padded under tp2."""
    words = [*save(tmp_path / "model", tiny, "Mixtral", **SMALL, tie_word_embeddings=True), "model.random_init=true"]
    alone = losses(posttrain, *words)
    for layout in ("tp2", "pp2", "ep2", "fsdp"):
        divided = [f"parallelism={layout}", "parallelism.nproc_per_node=2"]
        assert losses(posttrain, *words, *divided) == pytest.approx(alone, rel=1e-5), layout


def test_an_embedding_that_grows_and_is_divided(posttrain, tiny, tmp_path):
    """To 271 rows, padded to two times 136: the padding is no token in the loss, and the export has none of it."""
    words = save(tmp_path / "model", tiny, "Llama", **SMALL, vocab_size=269)
    words += ["template=chatml", 'template.special_tokens=["<|a|>","<|b|>"]', "template.add_special_tokens=true"]
    alone = losses(posttrain, *words)
    words = [word for word in words if word != "trainer.export=false"]
    result = posttrain(*words, "parallelism=tp2")
    assert result.code == 0, result.err + result.log()
    assert [*result.losses, result.summary["val_loss_after"]] == pytest.approx(alone, rel=1e-5)
    hf = result.run_dir / "hf"
    assert json.loads((hf / "config.json").read_text())["vocab_size"] == 271
    report = json.loads((hf / "verification.json").read_text())
    assert report["logits"]["checked"] and report["base"]["checked"] and report["tokenizer"]["tokens"] == 271


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_sample_answers_of_divided_rows(kind, posttrain, tiny, tmp_path):
    """With sequence parallelism, a mixture's by itself: the one token that a cache leaves can't be divided."""
    words = save(tmp_path / "model", tiny, kind, **SMALL, vocab_size=291)
    words += ["trainer.num_generations=2", "trainer.max_new_tokens=8", "trainer.max_steps=2", "optimizer.lr=1e-2"]
    answers = []
    for layout in ([], ["parallelism=tp2", "parallelism.sequence_parallel=true"]):
        result = posttrain(*words, *layout)
        assert result.code == 0, result.err + result.log()
        answers.append(json.loads((result.run_dir / "samples.json").read_text(encoding="utf-8")))
    assert answers[0] == answers[1]
    assert all(answer["before"] and answer["after"] for answer in answers[0])
