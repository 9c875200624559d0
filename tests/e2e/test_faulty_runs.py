"""Faults during a run: what it says, what is left, and that it resumes from there. See docs/reliability.md."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import ROOT, Result, environment, finish, workers
from safetensors.torch import load_file, save_file
from states import equal, saved
from transformers import AutoTokenizer

from posttrain.checkpoint import directories
from posttrain.launch import node_run
from posttrain.train.batches import TrainOrder

pytestmark = pytest.mark.nightly

SAVING = ("checkpoint.save_interval=1", "trainer.export=false")


def steps(result):
    return [line["step"] for line in result.metrics if "loss" in line]


@pytest.mark.every_run
def test_kill_9_and_a_flipped_bit(started, posttrain, words):
    """The command is killed while it saves after every step, and the disk spoils its newest checkpoint."""
    process, run_dir = started(*SAVING, "checkpoint.save_total_limit=3")
    process.kill()
    finish(process, run_dir)
    root = run_dir / "checkpoints"
    newest, skipped = directories.newest(root, hashes=True)
    assert newest is not None and not skipped
    shard = next(newest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    used = directories.newest(root, hashes=True)[0]
    last = directories.step_of(used) + 2

    again = posttrain(*words, *SAVING, f"trainer.max_steps={last}", run_dir=run_dir)
    assert again.code == 0, again.err + again.log()
    assert f"skipped {newest}: the content of {shard.name} has changed" in again.out
    assert f"resuming after step {directories.step_of(used)}" in again.out
    assert steps(again) == list(range(1, last + 1))
    assert directories.newest(root, hashes=True) == (directories.directory(root, last), [])


def test_no_whole_checkpoint_is_left(posttrain, words, tmp_path):
    """Starting from the beginning would hide the loss: refused, before anything heavy is imported."""
    broken = tmp_path / "run" / "checkpoints" / "iter_0000003"
    broken.mkdir(parents=True)
    result = posttrain(*words, run_dir=tmp_path / "run")
    assert result.code == 2
    assert "no checkpoint is whole" in result.err and f"{broken}: complete.json is missing" in result.err


def test_a_hanging_rank_is_noticed_and_the_run_goes_on(started):
    """One rank stops answering: all say where they are, the run is started again; SIGUSR1 then ends it in order."""
    process, run_dir = started(*SAVING, "parallelism.nproc_per_node=2", "launch.timeout_s=8", "launch.max_restarts=1")
    stuck = workers(process)[1]
    stuck.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert psutil.wait_procs([stuck], timeout=120)[0], "the hanging rank was not ended"
    assert time.monotonic() - begun < 8 + 60
    deadline = time.monotonic() + 120
    before = (run_dir / "metrics.jsonl").read_text().count('"loss"')
    while (run_dir / "metrics.jsonl").read_text().count('"loss"') <= before:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    result = finish(process, run_dir)
    assert "no progress for launch.timeout_s=8 seconds" in result.err
    assert "starting again from the newest checkpoint" in result.err
    stacks = result.log(0).partition("most recent call first")[2]
    assert "posttrain/train/trainer.py" in stacks and "in fit" in stacks
    assert result.code == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 after saving" in result.err
    assert steps(result) == list(range(1, len(steps(result)) + 1))


def test_a_second_ctrl_c_stops_at_once(started):
    process, run_dir = started()
    for rank in workers(process):
        rank.suspend()  # so that the first one can't be obeyed
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    result = finish(process, run_dir)
    assert time.monotonic() - begun < node_run.GRACE_S - 5
    assert result.code == 128 + signal.SIGINT and "Traceback" not in result.err
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"


def test_a_disk_that_takes_no_checkpoint(posttrain, words, tmp_path):
    """Files of more than 400 kB are refused by the kernel, as all are on a full disk."""
    run_dir = tmp_path / "run"
    plain = [word for word in words if not word.startswith("peft")]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *plain, "peft=none", *SAVING, f"hydra.run.dir={run_dir}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=200,
        env={**environment(posttrain.cache), "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )  # fmt: skip
    result = Result(done.returncode, done.stdout, done.stderr, run_dir)
    assert result.code == 2, result.err + result.log()
    assert "can't be written: a shard was not written to its end (" in result.err and "GB are free" in result.err
    assert "there is no earlier checkpoint" in result.err and "Traceback" not in result.err
    assert not list((run_dir / "checkpoints").glob("iter_*")) and not (run_dir / "checkpoints" / ".partial").exists()


def write_ringing_rows(tiny, directory, *numbers):
    """A model on which a bell's loss is NaN, and rows of which those at `numbers` of the order of training ring.

    Returns:
        The words for them, a row for each sequence; and the order.
    """
    model = shutil.copytree(tiny, directory / "model")
    (bell,) = AutoTokenizer.from_pretrained(model)("\x07", add_special_tokens=False).input_ids
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][bell] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()]
    order = TrainOrder(rows, 4, 15, 1234, None, blank={})
    for number in numbers:
        rows[order.row_at(number)]["messages"][0]["content"] = "ring \x07"
    (model / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data.packing=false", "data.validation_fraction=null"]
    return [f"model.path={model}", f"data.path={model / 'data.jsonl'}", *data], order


def test_non_finite_numbers_stop_before_they_are_saved(posttrain, words, tiny, tmp_path):
    """A row of the second batch of four makes its loss NaN."""
    ringing, _ = write_ringing_rows(tiny, tmp_path, 5)
    result = posttrain(*words, *ringing, *SAVING)
    assert result.code == 2
    assert "step 2: loss is nan" in result.err and "The batch was rows" in result.err
    assert [path.name for path in directories.checkpoints(result.run_dir / "checkpoints")] == ["iter_0000001"]


def test_going_back_from_a_bad_batch(posttrain, words, tiny, tmp_path, monkeypatch):
    """One row's loss is NaN: the run starts again from the checkpoint before it and trains on other rows instead.

    The secrets of its environment are in no file that it leaves.
    """
    secrets = {"HF_TOKEN": "hf_" + "s" * 34, "WANDB_API_KEY": "0123456789" * 4}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    ringing, order = write_ringing_rows(tiny, tmp_path, 9)  # in the third batch of four
    result = posttrain(*words, *ringing, *SAVING, "trainer.on_nonfinite=rollback")
    assert result.code == 0, result.err + result.log()
    assert "step 3: loss is nan and gradient norm is nan; going back to the checkpoint of step 2" in result.err
    left_out = ", ".join(str(order.row_at(index)) for index in range(8, 12))
    assert f"on without rows {left_out} of the training data" in result.err and "resuming after step 2" in result.out
    assert steps(result) == [1, 2, 3, 4] and all(math.isfinite(loss) for loss in result.losses)
    assert [line["rolled_back_from"] for line in result.metrics if "rolled_back_from" in line] == [3]
    (one,) = json.loads((result.run_dir / "status.json").read_text())["rollbacks"]
    assert (one["step"], one["to"]) == (3, 2) and result.summary["rollbacks"] == 1
    left = [path for path in result.run_dir.rglob("*") if path.is_file()]
    assert len(left) > 20
    for secret in secrets.values():
        assert not [path for path in left if secret.encode() in path.read_bytes()] and secret not in result.err


def test_non_finite_numbers_are_skipped_where_asked(posttrain, words, tiny, tmp_path):
    """Every step after the first has a NaN gradient: none of them changes the weights."""
    ringing, _ = write_ringing_rows(tiny, tmp_path, 5, 9, 13)
    result = posttrain(*words, *ringing, *SAVING, "trainer.on_nonfinite=skip")
    assert result.code == 0, result.err + result.log()
    assert [line["loss"] is None for line in result.metrics if "loss" in line] == [False, True, True, True]
    first, last = saved(result.run_dir, 1), saved(result.run_dir, 4)
    names = [name for name in first if name.startswith(("decoder", "optimizer"))]
    assert any("adapter" in name for name in names) and all(equal(first[name], last[name]) for name in names)


def test_a_flipped_bit_in_the_cached_rows(posttrain, words, tmp_path):
    """Found while the model is built, said, made again before the first step; the numbers are those of before."""
    words = [*words, f"cache_dir={tmp_path / 'cache'}", "trainer.export=false"]
    before = posttrain(*words)
    assert before.code == 0, before.err + before.log()
    (rows,) = tmp_path.rglob("rows.arrow")
    intact = rows.read_bytes()
    content = bytearray(intact)
    content[len(content) // 3] ^= 1
    rows.write_bytes(content)
    again = posttrain(*words)
    assert again.code == 0, again.err + again.log()
    said = "data: the cached rows have changed since they were written; they are made again"
    assert said in again.err
    (rows,) = tmp_path.rglob("rows.arrow")
    assert rows.read_bytes() == intact
    for key in ("step", "batch", "lr", "loss", "grad_norm", "val_loss"):
        assert [line.get(key) for line in again.metrics] == [line.get(key) for line in before.metrics], key
    third = posttrain(*words)
    assert third.code == 0 and said not in third.err
    assert third.losses == before.losses
