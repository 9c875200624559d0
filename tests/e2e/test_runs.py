"""Runs from the command line: what they leave behind, and that it is what was trained."""

import json
import signal

import pytest
import tiny_model
import yaml
from commands import Result, finish
from omegaconf import OmegaConf

LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
LAYOUTS = ("pp2", "tp2", "zero1", "fsdp", "ddp")


def variant(groups: dict[str, object] | None = None, **settings: object) -> dict[str, object]:
    """A file of the group `experiment`: other choices of groups, and keys below them."""
    chosen = [{f"override /{group}": choice} for group, choice in (groups or {}).items()]
    return {"defaults": chosen, **settings}


VARIANTS = {
    "accumulation": variant({"peft": "none"}, trainer={"micro_batch_size": 4, "export": False}),
    "lora_plus": variant(trainer={"export": False}, peft={**LORA, "lora_plus_ratio": 0.125}),
    "recomputed": variant(trainer={"recompute": "full", "recompute_layers": 1, "export": False}, peft=LORA),
    "fast": variant(trainer={"export": False}),
    "plain": variant(trainer={"export": False, "skip_prompt_logits": False}, peft={"fused": False}),
    "tracked": variant(
        {"logger": ["wandb", "tensorboard"]},
        model={"random_init": True},
        logger={"wandb": {"mode": "offline"}},
        peft=LORA,
    ),
}
for layout in LAYOUTS:
    two = {"nproc_per_node": 2}
    VARIANTS[layout] = variant({"parallelism": layout}, parallelism=two, trainer={"validation_interval": 2}, peft=LORA)


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


@pytest.fixture(scope="module")
def trials(posttrain, words, selected, tmp_path_factory):
    """The variants that tests ask for, by name: trials of one sweep, of which one process does the imports."""
    folder = tmp_path_factory.mktemp("variants")
    (folder / "experiment").mkdir()
    names = sorted({name for params in selected for name in params.get("names", "").split()})
    for name in names:
        content = f"# @package _global_\n{yaml.safe_dump(VARIANTS[name], sort_keys=False)}"
        (folder / "experiment" / f"{name}.yaml").write_text(content, encoding="utf-8")
    shared = [word for word in words if not word.startswith("peft")]
    swept = f"experiment=choice({','.join(names)})"
    command = ["--config-dir", str(folder), "--multirun", swept, *shared, f"hydra.sweep.dir={folder / 'sweep'}"]
    result = posttrain(*command, timeout=900)
    assert result.code == 0, result.err
    return {name: Result(0, result.out, result.err, folder / "sweep" / f"experiment={name}") for name in names}


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


def test_each_rank_of_a_machine_is_prestarted(started):
    import psutil

    process, run_dir = started("launch.prestart=true", "parallelism.nproc_per_node=2")
    ranks = psutil.Process(process.pid).children()
    assert [rank.cmdline()[1:] for rank in ranks] == 2 * [["-m", "posttrain.launch.worker"]]  # without a run
    process.send_signal(signal.SIGTERM)
    result = finish(process, run_dir)
    assert result.code == 128 + signal.SIGTERM, result.err
    assert "patches: imports" in result.log(0) and "patches: imports" in result.log(1)


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


@pytest.mark.parametrize("names", [*LAYOUTS[:-1], pytest.param(LAYOUTS[-1], marks=pytest.mark.nightly)])
def test_two_processes_have_the_losses_of_one(trials, lora, names):
    """Same global batches, so the same losses up to the order of fp32 sums: 1e-5 relative."""
    result = trials[names]
    assert result.losses == pytest.approx(lora.losses, rel=1e-5)
    assert result.summary["val_loss_after"] == pytest.approx(lora.summary["val_loss_after"], rel=1e-5)
    assert result.summary["supervised_tokens"] == lora.summary["supervised_tokens"]
    report = json.loads((result.run_dir / "adapter" / "verification.json").read_text())
    assert report["logits"]["checked"] and report["logits"]["difference"] <= report["logits"]["tolerance"] == 1e-4
    assert report["tensors"]["against"] == "the base's matrices"


@pytest.mark.parametrize("names", ["accumulation"])
def test_accumulation_and_packing_do_not_change_the_loss(trials, full, names):
    """A micro-batch of 4 is the sum of four of 1."""
    assert trials[names].losses == pytest.approx(full.losses, rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("names", ["fast plain"])
def test_fast_paths_have_the_losses_of_the_plain_ones(trials, names):
    """Fused adapters and logits of supervised tokens alone, against Megatron-Bridge's own way."""
    fast, plain = (trials[name] for name in names.split())
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fast.summary["val_loss_after"] == pytest.approx(plain.summary["val_loss_after"], rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("names", ["recomputed"])
def test_layers_that_are_computed_again_change_nothing(trials, lora, names):
    assert trials[names].losses == lora.losses


@pytest.mark.parametrize("names", ["lora_plus"])
def test_lora_plus_sets_the_pace_of_b(trials, lora, names):
    """The same first loss and the same A's learning rate; B, which starts at zero, moves an eighth as far."""
    result = trials[names]
    rates = [[line["lr"] for line in run.metrics if "loss" in line] for run in (result, lora)]
    assert rates[0] == rates[1]
    assert result.losses[0] == pytest.approx(lora.losses[0], rel=1e-6)
    moved = [lora.losses[0] - run.losses[-1] for run in (result, lora)]
    assert 0 < moved[0] < 0.95 * moved[1], moved


@pytest.mark.parametrize("names", ["tracked"])
def test_random_weights_and_trackers(trials, names):
    """model.random_init, an offline Weights & Biases run and TensorBoard events."""
    run_dir = trials[names].run_dir
    assert list((run_dir / "tensorboard").glob("events.*"))
    runs = list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
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
    """`python -m posttrain` on real weights, shortened to three steps of a quarter of the size."""
    pytest.importorskip("gguf")
    words = ["trainer.max_steps=3", "trainer.global_batch_size=2", "data.max_validation_rows=6"]
    words += ["trainer.num_generations=1", "trainer.max_new_tokens=8"]
    result = posttrain(*words, cache=demo_cache)
    assert result.code == 0, result.err + result.log()
    assert result.summary["val_loss_after"] < 0.8 * result.summary["val_loss_before"]
    assert (result.run_dir / "adapter" / "adapter_model.safetensors").is_file()
