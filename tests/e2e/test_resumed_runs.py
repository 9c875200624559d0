"""A run that was stopped and resumed is the run that was not stopped: batches, learning rates, losses, weights."""

import json
import shutil

import pytest
import tiny_model
from safetensors.torch import load_file
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
    if request.param in ("full", "zero1", "fsdp"):
        words = [word for word in words if not word.startswith("peft")] + ["peft=none"]
    if request.param == "zero1":  # the optimizer's state divided over two processes
        words += ["parallelism=zero1", "parallelism.nproc_per_node=2"]
    if request.param.startswith("fsdp"):
        words += ["parallelism=fsdp", "parallelism.nproc_per_node=2"]
    result = posttrain(*words)
    assert result.code == 0, result.err + result.log()
    return words, result


@pytest.mark.parametrize("whole", ["lora", "full", "zero1", "fsdp", "fsdp_lora"], indirect=True)
def test_resumed_run_is_the_whole_run(posttrain, whole, tmp_path):
    """Bit for bit on a CPU, over the end of an epoch and with the last line of metrics.jsonl torn."""
    words, result = whole
    assert len({line["batch"] for line in result.metrics if "batch" in line}) == 8
    again = posttrain(*words, run_dir=cut(result, tmp_path / "run", 4, tmp_path))
    assert again.code == 0, again.err + again.log()
    assert "resuming after step 4" in again.out
    same_run(result, again)
    same_state(saved(again.run_dir, 8), saved(result.run_dir, 8))


def test_a_run_resumed_within_an_epoch_and_between_two_lines(posttrain, words, tiny, tmp_path):
    """Whole epochs, the last step of each with the rows that are left; every third step is logged, TensorBoard too.

    Its rows have been moved meanwhile.
    """
    words = [word for word in words if not word.startswith("trainer.max_steps")]
    words += [*SAVED, "trainer.epochs=2", "trainer.log_interval=3", "checkpoint.save_interval=2", "peft.dropout=0.1",
              "trainer.generation_interval=4", "logger=tensorboard"]  # fmt: skip
    whole = posttrain(*words)
    assert whole.code == 0, whole.err + whole.log()
    per_epoch = whole.summary["steps"] // 2
    rows = whole.summary["data"]["train"]["packed_sequences"]
    assert per_epoch == -(-rows // 4) and rows % 4, "the last step of an epoch has fewer rows"
    assert whole.metrics[-2]["epoch"] == 2 and whole.summary["tokens"] == 2 * whole.summary["data"]["train"]["tokens"]
    shutil.copytree(whole.run_dir, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("iter_*"):
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    moved = shutil.copy(tiny / "data.jsonl", tmp_path / "moved.jsonl")
    words = [word for word in words if not word.startswith("data.path")] + [f"data.path={moved}"]
    again = posttrain(*words, run_dir=tmp_path / "run")
    assert again.code == 0, again.err + again.log()
    assert "resuming after step 4" in again.out
    for key in ("step", "lr", "loss", "grad_norm", "val_loss", "epoch"):
        assert [line.get(key) for line in again.metrics] == [line.get(key) for line in whole.metrics], key
    same_state(saved(again.run_dir, 2 * per_epoch), saved(whole.run_dir, 2 * per_epoch))
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    for run in (whole, again):
        events = reader.EventAccumulator(str(run.run_dir / "tensorboard"))
        events.Reload()
        steps = [event.step for event in events.Tensors("train/loss")]
        assert steps == [line["step"] for line in run.metrics if "loss" in line]
        assert [event.step for event in events.Tensors("samples/0/text_summary")] == [0, 4, 8, 12, 14]
    status = (again.run_dir / "status.json").read_text(encoding="utf-8")
    fewer = posttrain(*words, "trainer.epochs=1.5", run_dir=again.run_dir)
    assert fewer.code == 2 and f"trainer.epochs=1.5: {-(-per_epoch * 3 // 2)} steps are asked for" in fewer.err
    assert (again.run_dir / "status.json").read_text(encoding="utf-8") == status  # it is a finished run still


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
    more = ["trainer.max_steps=10", "trainer.log_interval=2", "trainer.num_generations=0"]
    longer = posttrain(*words, *more, run_dir=tmp_path / "run")
    assert longer.code == 0, longer.err + longer.log()
    assert (
        "Sample answers" in result.out and "Sample answers" not in longer.out
    )  # half of them would be of a run before
    assert [line["step"] for line in longer.metrics if "loss" in line] == [*range(1, 9), 10]
    assert longer.summary["steps"] == 10 and longer.summary["val_loss_before"] == result.summary["val_loss_before"]
    status = (tmp_path / "run" / "status.json").read_text(encoding="utf-8")
    less = posttrain(*words, "trainer.max_steps=6", run_dir=tmp_path / "run")
    assert less.code == 2 and "6 steps are asked for" in less.err
    assert (tmp_path / "run" / "status.json").read_text(encoding="utf-8") == status  # it is a finished run still


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


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_resumed_run_whose_embedding_has_grown(peft, posttrain, words, tmp_path):
    """The template brings more tokens than the model has rows: the same new rows each time, or the trained ones."""
    tight = tiny_model.write(tmp_path / "tight", rows=269)
    words = [word for word in words if not word.startswith(("peft", "model.path", "data.path"))]
    words += [f"model.path={tight}", f"data.path={tight / 'data.jsonl'}", "template=llama3",
              "template.add_special_tokens=true", f"peft={peft}", *SAVED[:-1], "checkpoint.save_interval=2",
              "trainer.max_steps=6"]  # fmt: skip
    whole = posttrain(*words)
    assert whole.code == 0, whole.err + whole.log()
    assert "the embedding grows from 269 to" in whole.log()
    cut(whole, tmp_path / "run", 2, tmp_path)
    for export in ("adapter", "hf"):
        shutil.rmtree(tmp_path / "run" / export, ignore_errors=True)
    again = posttrain(*words, run_dir=tmp_path / "run")
    assert again.code == 0, again.err + again.log()
    assert "resuming after step 2" in again.out
    same_run(whole, again)
    same_state(saved(again.run_dir, 6), saved(whole.run_dir, 6))
    name = "adapter/adapter_model.safetensors" if peft == "lora" else "hf/model.safetensors"
    exports = [load_file(run.run_dir / name) for run in (whole, again)]
    assert exports[0].keys() == exports[1].keys()
    grown = [key for key, tensor in exports[0].items() if tensor.ndim == 2 and tensor.shape[0] > 269]
    assert len(grown) == 2  # embedding and output matrix
    for key, tensor in exports[0].items():
        assert tensor.equal(exports[1][key]), key
