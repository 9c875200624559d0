"""A run that was stopped and resumed is the run that was not stopped: batches, learning rates, losses, weights."""

import json
import shutil

import pytest
from states import same_state, saved

pytestmark = pytest.mark.nightly

SAVED = ("trainer.validation_interval=2", "scheduler=cosine", "scheduler.lr_warmup_fraction=0.25",
         "trainer.num_generations=1", "trainer.export=false")  # fmt: skip


def same_run(whole, resumed):
    """Compare two runs' steps and sums."""
    for key in ("step", "batch", "lr", "loss", "grad_norm", "val_loss", "epoch"):
        assert [line.get(key) for line in resumed.metrics] == [line.get(key) for line in whole.metrics], key
    for key in ("supervised_tokens", "tokens", "val_loss_before", "val_loss_after", "train_loss", "steps"):
        assert resumed.summary[key] == whole.summary[key], key
    samples = [json.loads((run.run_dir / "samples.json").read_text()) for run in (whole, resumed)]
    assert samples[0] == samples[1]


def cut(whole, to, step, tmp_path):
    """A copy of a run's directory as a kill after the save of `step`, and some steps further, would leave it."""
    shutil.copytree(whole.run_dir, to)
    for path in (to / "checkpoints").glob("iter_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    for name in ("summary.json", "samples.json"):
        path = to / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    lines = (to / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == step + 2)
    (to / "metrics.jsonl").write_text("".join(lines[:last]) + lines[last][:20])  # the last line half written
    return to


@pytest.fixture(scope="module")
def whole(request, posttrain, words):
    """Eight steps in one go, saved every two; (words, result)."""
    words = [*words, *SAVED, "checkpoint.save_interval=2", "trainer.max_steps=8", "peft.dropout=0.1"]
    if request.param in ("full", "zero1"):
        words = [word for word in words if not word.startswith("peft")] + ["peft=none"]
    if request.param == "zero1":  # the optimizer's state divided over two processes
        words += ["parallelism=zero1", "parallelism.nproc_per_node=2"]
    result = posttrain(*words)
    assert result.code == 0, result.err + result.log()
    return words, result


@pytest.mark.parametrize("whole", ["lora", "full", "zero1"], indirect=True)
def test_resumed_run_is_the_whole_run(posttrain, whole, tmp_path):
    """Bit for bit on a CPU, over the end of an epoch and with the last line of metrics.jsonl torn."""
    words, result = whole
    assert len({line["batch"] for line in result.metrics if "batch" in line}) == 8
    again = posttrain(*words, run_dir=cut(result, tmp_path / "run", 4, tmp_path))
    assert again.code == 0, again.err + again.log()
    assert "resuming after step 4" in again.out
    same_run(result, again)
    same_state(saved(again.run_dir, 8), saved(result.run_dir, 8))


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_another_data_parallel_size_has_the_same_batches(posttrain, whole, tmp_path):
    words, result = whole
    two = posttrain(*words, "parallelism.nproc_per_node=2", run_dir=cut(result, tmp_path / "run", 4, tmp_path))
    assert two.code == 0, two.err + two.log()
    for key in ("step", "batch", "lr"):
        assert [line.get(key) for line in two.metrics] == [line.get(key) for line in result.metrics], key
    assert two.losses == pytest.approx(result.losses, rel=0.02)  # dropout differs


@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_a_finished_run_is_not_trained_again_and_can_be_prolonged(posttrain, whole, tmp_path):
    words, result = whole
    shutil.copytree(result.run_dir, tmp_path / "run")
    again = posttrain(*words, run_dir=tmp_path / "run")
    assert again.code == 0, again.err + again.log()
    same_run(result, again)
    longer = posttrain(*words, "trainer.max_steps=10", "trainer.log_interval=2", run_dir=tmp_path / "run")
    assert longer.code == 0, longer.err + longer.log()
    assert [line["step"] for line in longer.metrics if "loss" in line] == [*range(1, 9), 10]
    assert longer.summary["steps"] == 10 and longer.summary["val_loss_before"] == result.summary["val_loss_before"]
    less = posttrain(*words, "trainer.max_steps=6", run_dir=tmp_path / "run")
    assert less.code == 2 and "6 steps are asked for" in less.err


@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_what_may_not_change_is_shown(posttrain, whole):
    """Refused before anything heavy is imported, and the run is left as it is."""
    words, result = whole
    before = (result.run_dir / "config.yaml").read_text()
    changed = posttrain(*words, "optimizer.lr=3e-4", "trainer.global_batch_size=8", run_dir=result.run_dir)
    assert changed.code == 2
    assert "optimizer.lr: 0.01 -> 0.0003" in changed.err and "trainer.global_batch_size: 4 -> 8" in changed.err
    assert "seq_length" not in changed.err
    never = posttrain(*words, "run.resume=never", run_dir=result.run_dir)
    assert never.code == 2 and "run.resume=never" in never.err
    assert (result.run_dir / "config.yaml").read_text() == before


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_other_rows_and_weights_under_the_same_names_are_refused(posttrain, whole, tiny, tmp_path):
    words, result = whole
    files = {path: path.read_bytes() for path in (tiny / "data.jsonl", tiny / "model.safetensors")}
    try:
        (tiny / "data.jsonl").write_bytes(files[tiny / "data.jsonl"].replace(b"hello", b"bye"))
        (tiny / "model.safetensors").write_bytes(files[tiny / "model.safetensors"][:-4096] + bytes(4096))
        again = posttrain(*words, run_dir=cut(result, tmp_path / "run", 4, tmp_path))
    finally:
        for path, content in files.items():
            path.write_bytes(content)
    assert again.code == 2 and "changed since it was saved" in again.err
    assert "training rows of data.path" in again.err and "the weights of model.path" in again.err
