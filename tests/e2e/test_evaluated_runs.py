"""A run's result, evaluated by transformers, has the validation loss that Megatron found."""

import json
import shutil
import sys

import pytest


@pytest.fixture(scope="module")
def run(posttrain, words):
    """A LoRA run of one process."""
    result = posttrain(*words, "checkpoint.save_interval=4", "data.validation_fraction=0.2")
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
        found = evaluate(what)["sets"]["data"]
        assert found["split"] == "validation" and found["loss"] == pytest.approx(expected, rel=1e-5), what
    trained = evaluate(run.run_dir, "evaluate.split=train")["sets"]["data"]
    assert trained["conversations"] == 48 and trained["loss"] != pytest.approx(expected, rel=1e-5)
    changed = evaluate(run.run_dir, "data.validation_fraction=0.1", "trainer.seq_length=64")["sets"]["data"]
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
