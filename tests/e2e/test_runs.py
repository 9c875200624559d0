"""Runs from the command line: what they leave behind, and that it is what was trained."""

import json

import pytest
import tiny_model
from omegaconf import OmegaConf


@pytest.fixture(scope="module")
def lora(posttrain, words):
    """A LoRA run of one process."""
    saving = ["trainer.validation_interval=2", "checkpoint.save_interval=2"]
    result = posttrain(*words, "trainer.num_generations=1", *saving)
    assert result.code == 0, result.err + result.log()
    return result


@pytest.fixture(scope="module")
def full(posttrain, words):
    """A full fine-tuning of one process, which imports while the command composes."""
    plain = [word for word in words if not word.startswith("peft")]
    result = posttrain(*plain, "peft=none", "launch.prestart=true")
    assert result.code == 0, result.err + result.log()
    return result


def test_what_a_run_leaves_behind(lora):
    left = {path.name for path in lora.run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "samples.json", "status.json", "checkpoints", "adapter",
            "logs"} <= left  # fmt: skip
    assert json.loads((lora.run_dir / "status.json").read_text())["state"] == "finished"
    summary = lora.summary
    for key in ("train_loss", "val_loss_before", "val_loss_after", "steps", "supervised_tokens", "run_dir",
                "supervised_tokens_per_second", "time_to_first_step_s", "peak_memory_gib"):  # fmt: skip
        assert summary[key] is not None, key
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert summary["steps"] == 4 and len(lora.losses) == 4
    assert [line["step"] for line in lora.metrics if "val_loss" in line] == [0, 2, 4]
    assert set(json.loads((lora.run_dir / "samples.json").read_text())[0]) == {"prompt", "before", "after", "reference"}


def test_the_screen_shows_results_and_the_log_has_the_noise(lora):
    assert "validation loss" in lora.out and str(lora.run_dir) in lora.out
    assert "Megatron" not in lora.out and "Warning" not in lora.out + lora.err
    assert "patches: imports" in lora.log()


def test_a_prestarted_rank_is_a_rank(full, lora):
    assert next(iter(full.summary["startup_s"])) == "compose, import"
    assert next(iter(lora.summary["startup_s"])) == "compose, launch"
    assert "patches: imports" in full.log() and "Warning" not in full.out + full.err
    total = sum(full.summary["startup_s"].values())
    assert full.summary["time_to_first_step_s"] == pytest.approx(total, abs=0.1)


def test_a_prestarted_rank_ends_with_a_mistaken_command(posttrain):
    import psutil

    def waiting():
        found = psutil.process_iter(["cmdline"])
        return [p for p in found if (p.info["cmdline"] or [])[-2:] == ["-m", "posttrain.launch.worker"]]

    before = {p.pid for p in waiting()}
    result = posttrain("trainer.max_stps=3", "launch.prestart=true")
    assert result.code == 2 and "trainer.max_steps" in result.err
    psutil.wait_procs(mine := [p for p in waiting() if p.pid not in before], timeout=60)
    assert not [p for p in mine if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_frozen_configuration_is_resolved(lora):
    text = (lora.run_dir / "config.yaml").read_text()
    assert "${" not in text
    assert OmegaConf.create(text).optimizer.lr == 1e-2


def test_adapter_is_what_was_trained(lora, tiny):
    """PEFT's own model from the export has the loss that Megatron's had after training."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = hf_loss(base, lora, tiny)
    model = PeftModel.from_pretrained(base, lora.run_dir / "adapter")
    names = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "v_proj", "down_proj"}
    assert before == pytest.approx(lora.summary["val_loss_before"], rel=1e-4)
    assert hf_loss(model, lora, tiny) == pytest.approx(lora.summary["val_loss_after"], rel=1e-4)


def test_full_model_is_what_was_trained(full, tiny):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(full.run_dir / "hf", dtype=torch.float32)
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(matrix.weight) == tiny_model.ROWS  # nothing of what Megatron's is filled up with
    assert hf_loss(model, full, tiny) == pytest.approx(full.summary["val_loss_after"], rel=1e-4)
    assert full.summary["val_loss_after"] < full.summary["val_loss_before"]


def hf_loss(model, result, tiny):
    """Validation loss by transformers, over the same rows one conversation at a time."""
    import torch
    from transformers import AutoTokenizer

    from posttrain.config.composition import compose

    cfg = compose(["data=messages", f"data.path={tiny / 'data.jsonl'}", "data.validation_fraction=0.1"])
    from hydra.utils import instantiate

    data = instantiate(cfg.data)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    encoder = instantiate(cfg.objective).encoder(data, instantiate(cfg.template), tokenizer, 128)
    splits = data.build(encoder=encoder, seq_length=128, seed=cfg.seed, cache_dir=result.run_dir / "cache")
    total, count = 0.0, 0
    for row in splits.validation:
        start = 0
        for length in map(int, row["seq_lens"]):
            piece = slice(start, start + length)
            start += length
            ids, labels, mask = (torch.tensor(row[key][piece]).long() for key in ("input_ids", "labels", "loss_mask"))
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            total += float((losses * mask).sum())
            count += int(mask.sum())
    return total / count


NIGHTLY_LAYOUTS = [pytest.param(layout, marks=pytest.mark.nightly) for layout in ("ddp", "tp2")]


@pytest.mark.parametrize("layout", ["pp2", "zero1", "fsdp", *NIGHTLY_LAYOUTS])
def test_two_processes_have_the_losses_of_one(posttrain, words, lora, layout):
    """Same global batches, so the same losses up to the order of fp32 sums: 1e-5 relative."""
    result = posttrain(*words, f"parallelism={layout}", "parallelism.nproc_per_node=2", "trainer.validation_interval=2")
    assert result.code == 0, result.err + result.log()
    assert result.losses == pytest.approx(lora.losses, rel=1e-5)
    assert result.summary["val_loss_after"] == pytest.approx(lora.summary["val_loss_after"], rel=1e-5)
    assert result.summary["supervised_tokens"] == lora.summary["supervised_tokens"]


def test_accumulation_and_packing_do_not_change_the_loss(posttrain, words, full):
    """A micro-batch of 4 is the sum of four of 1."""
    plain = [word for word in words if not word.startswith("peft")]
    result = posttrain(*plain, "peft=none", "trainer.micro_batch_size=4", "trainer.export=false")
    assert result.code == 0, result.err + result.log()
    assert result.losses == pytest.approx(full.losses, rel=1e-5)


@pytest.mark.nightly
def test_fast_paths_have_the_losses_of_the_plain_ones(posttrain, words):
    """Fused adapters and logits of supervised tokens alone, against Megatron-Bridge's own way."""
    words = [word for word in words if not word.startswith("peft")]
    fast = posttrain(*words, "trainer.export=false")
    plain = posttrain(*words, "trainer.export=false", "peft.fused=false", "trainer.skip_prompt_logits=false")
    assert fast.code == plain.code == 0, fast.log() + plain.log()
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fast.summary["val_loss_after"] == pytest.approx(plain.summary["val_loss_after"], rel=1e-5)


@pytest.mark.nightly
def test_layers_that_are_computed_again_change_nothing(posttrain, words, lora):
    result = posttrain(*words, "trainer.recompute=full", "trainer.recompute_layers=1", "trainer.export=false")
    assert result.code == 0, result.err + result.log()
    assert result.losses == lora.losses


def test_lora_plus_sets_the_pace_of_b(posttrain, words, lora):
    """The same first loss and the same A's learning rate; B, which starts at zero, moves an eighth as far."""
    result = posttrain(*words, "peft.lora_plus_ratio=0.125", "trainer.export=false")
    assert result.code == 0, result.err + result.log()
    rates = [[line["lr"] for line in run.metrics if "loss" in line] for run in (result, lora)]
    assert rates[0] == rates[1]
    assert result.losses[0] == pytest.approx(lora.losses[0], rel=1e-6)
    moved = [lora.losses[0] - run.losses[-1] for run in (result, lora)]
    assert 0 < moved[0] < 0.95 * moved[1], moved


def test_random_weights_and_trackers(posttrain, words):
    """model.random_init, an offline Weights & Biases run and TensorBoard events."""
    result = posttrain(*words, "model.random_init=true", "logger=[wandb,tensorboard]", "logger.wandb.mode=offline",
                       "trainer.max_steps=2")  # fmt: skip
    assert result.code == 0, result.err + result.log()
    assert list((result.run_dir / "tensorboard").glob("events.*"))
    runs = list((result.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert runs and runs[0].stat().st_size > 1000


def test_mistakes_found_in_the_worker_are_users_errors_too(posttrain, words):
    result = posttrain(*words, "+trainer.megatron.model.recompute_granulariti=full")
    assert result.code == 2
    assert (
        "trainer.megatron.model.recompute_granulariti: unknown key; did you mean `recompute_granularity`?" in result.err
    )
    assert "Traceback" not in result.err
    assert json.loads((result.run_dir / "status.json").read_text())["state"] == "failed"


def test_default_run_learns(posttrain, demo_cache):
    """`python -m posttrain` on real weights, shortened to three steps of half the size."""
    pytest.importorskip("gguf")
    words = ["trainer.max_steps=3", "trainer.global_batch_size=4", "trainer.num_generations=1"]
    words += ["data.max_validation_rows=12"]
    result = posttrain(*words, cache=demo_cache)
    assert result.code == 0, result.err + result.log()
    assert result.summary["val_loss_after"] < 0.8 * result.summary["val_loss_before"]
    assert (result.run_dir / "adapter" / "adapter_model.safetensors").is_file()
