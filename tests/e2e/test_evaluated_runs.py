"""A run's result, evaluated by transformers, has the validation loss that Megatron found; answers on the way."""

import json
import shutil
import sys

import pytest

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def sampled(words):
    """The words of a run with sample answers."""
    return [*words, "checkpoint.save_interval=4", "data.validation_fraction=0.2", "trainer.num_generations=2",
            "trainer.max_new_tokens=6"]  # fmt: skip


@pytest.fixture(scope="module")
def run(posttrain, sampled):
    """A LoRA run of one process."""
    result = posttrain(*sampled)
    assert result.code == 0, result.err + result.log()
    return result


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Run the command in this process; returns result.json."""
    from posttrain.evaluate.__main__ import main

    def call(what, *words):
        monkeypatch.setattr(sys, "argv", ["evaluate", str(what), *words, f"evaluate.out={tmp_path / 'out'}"])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        main()
        return json.loads((tmp_path / "out" / "result.json").read_text())

    return call


def test_a_run_its_export_and_its_checkpoint(run, evaluate, tmp_path):
    """fp32: equal to 1e-5, relative; the words of the run need not be said again, and can be changed."""
    expected = run.summary["val_loss_after"]
    trial = tmp_path / "lr=0.1,rank=8"  # as in a sweep, without an export
    shutil.copytree(run.run_dir / "checkpoints", trial / "checkpoints")
    shutil.copy(run.run_dir / "config.yaml", trial)
    for what in (run.run_dir, run.run_dir / "adapter", trial / "checkpoints" / "iter_0000004"):
        found = evaluate(what)["datasets"]["data"]
        assert found["split"] == "validation" and found["loss"] == pytest.approx(expected, rel=1e-5), what
    trained = evaluate(run.run_dir, "evaluate.split=train")["datasets"]["data"]
    assert trained["conversations"] == 48 and trained["loss"] != pytest.approx(expected, rel=1e-5)
    changed = evaluate(run.run_dir, "data.validation_fraction=0.1", "trainer.seq_length=64")["datasets"]["data"]
    assert changed["conversations"] == 6


def test_a_checkpoint_of_another_model(run, evaluate, tmp_path, capsys):
    """The configuration beside it says more layers than the checkpoint has."""
    other = tmp_path / "run"
    shutil.copytree(run.run_dir / "checkpoints", other / "checkpoints")
    base = tmp_path / "base"
    config = (run.run_dir / "config.yaml").read_text()
    source = next(line.split(": ")[1] for line in config.splitlines() if line.strip().startswith("path: "))
    shutil.copytree(source, base)
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, num_hidden_layers=2))
    model.save_pretrained(base)
    (other / "config.yaml").write_text(config.replace(f"path: {source}", f"path: {base}", 1))
    with pytest.raises(SystemExit) as stop:
        evaluate(other)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "iter_0000004" in err and "Traceback" not in err, err


def test_answers_during_training_do_not_disturb_it(posttrain, sampled, run):
    """Losses, gradients and weights are equal to the bit; answers are in samples.jsonl and in every tracker."""
    from safetensors.torch import load_file

    more = ["trainer.generation_interval=1", "logger=[wandb,tensorboard]", "logger.wandb.mode=offline"]
    result = posttrain(*sampled, *more, "peft.dropout=0.0")
    assert result.code == 0, result.err + result.log()
    for key in ("loss", "grad_norm", "val_loss", "batch"):
        assert [line.get(key) for line in result.metrics] == [line.get(key) for line in run.metrics]
    weights = [load_file(one.run_dir / "adapter" / "adapter_model.safetensors") for one in (result, run)]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    lines = [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    ends = json.loads((result.run_dir / "samples.json").read_text())
    assert [line["answer"] for line in lines[:2] + lines[-2:]] == [s["before"] for s in ends] + [
        s["after"] for s in ends
    ]
    assert ends == json.loads((run.run_dir / "samples.json").read_text())
    assert not (run.run_dir / "samples.jsonl").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.run_dir / "tensorboard"))
    events.Reload()
    texts = events.Tensors("samples/1/text_summary")
    assert [event.step for event in texts] == [0, 1, 2, 3, 4]
    assert lines[1]["reference"] in texts[0].tensor_proto.string_val[0].decode()
    assert list((result.run_dir / "wandb").glob("offline-run-*/files/media/table/samples_*.json"))
    from posttrain.report import write_report

    assert "Answers during training" in write_report(result.run_dir).read_text()
    assert "Answers during training" not in write_report(run.run_dir).read_text()


def test_answers_during_training_over_two_processes(posttrain, sampled, run):
    """Tensor parallel: each process has half of every layer, and the answers are those of one process."""
    result = posttrain(*sampled, "trainer.generation_interval=2", "parallelism=tp2", "parallelism.nproc_per_node=2")
    assert result.code == 0, result.err + result.log()
    lines = [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4]
    ends = json.loads((run.run_dir / "samples.json").read_text())
    assert [line["answer"] for line in lines[-2:]] == [sample["after"] for sample in ends]
    assert result.losses == pytest.approx(run.losses, rel=1e-5)


def test_a_runs_model_card(run):
    """What the run found stands in it, for people and for a hub."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(run.run_dir / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "unknown"
    facts = json.loads((run.run_dir / "adapter" / "training.json").read_text())
    assert facts["results"]["val_loss_after"] == run.summary["val_loss_after"]
    assert f"| val_loss_after | {run.summary['val_loss_after']:.4g} |" in card.content
    assert "`data.jsonl`" in card.content and facts["data"]["sha256"]["data.path"][0] in card.content
    assert str(run.run_dir.parent) not in card.content
