"""Fault tolerance on a GPU with Transformer Engine: `pytest tests/e2e/test_gpu_reliability.py -m gpu -s`, one GPU.

Twelve starts of a run, most of them on a model that is nothing but quick. Numbers that are measured are printed.
"""

import json
import signal
import time
from pathlib import Path
from statistics import median

import psutil
import pytest
from commands import finish, workers
from states import equal, saved
from test_resumed_runs import SAVED, cut, same_run

from posttrain.checkpoint import directories

pytestmark = pytest.mark.gpu
BELL = "\x07"  # its embedding is NaN


@pytest.fixture(scope="module", autouse=True)
def gpu():
    from posttrain.utils.gpus import visible_gpus

    if not visible_gpus():
        pytest.skip("no GPU")


def write_rows(path, rows):
    path.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}) + "\n"
        for ask, answer in rows
    ))  # fmt: skip
    return path


def configuration(**sizes):
    from tiny_tokenizer import byte_tokenizer
    from transformers import LlamaConfig

    tokenizer = byte_tokenizer()
    return tokenizer, LlamaConfig(
        vocab_size=288, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, architectures=["LlamaForCausalLM"],
        **sizes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small Llama of which one embedding is NaN; good.jsonl without that token, bad.jsonl with it in one row."""
    import torch
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    tokenizer, config = configuration(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config)
    (bell,) = tokenizer(BELL, add_special_tokens=False).input_ids
    llama.model.embed_tokens.weight.data[bell] = float("nan")
    llama.save_pretrained(directory)
    rows = [(f"say {i} " + "la " * (i % 5), f"number {i}, hello world") for i in range(120)]
    write_rows(directory / "good.jsonl", rows)
    rows[60] = (f"ring {BELL}", "ring")
    write_rows(directory / "bad.jsonl", rows)
    return directory


@pytest.fixture(scope="module")
def words(model) -> list[str]:
    """The words of a short run."""
    return [
        "model=hf", f"model.path={model}", "data=messages", f"data.path={model / 'good.jsonl'}", "parallelism=single",
        "trainer.seq_length=256", "trainer.global_batch_size=4", "trainer.max_steps=4", "trainer.num_generations=0",
        "trainer.export=false", "optimizer.lr=1e-3", "scheduler=constant", "peft=none",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory, model) -> list[str]:
    """The words of a run of 150 M parameters: 2 GB in a checkpoint."""
    directory = tmp_path_factory.mktemp("wide")
    tokenizer, config = configuration(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=16, num_key_value_heads=16
    )
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)
    return [
        "model=hf", f"model.path={directory}", "model.random_init=true", "data=messages", "parallelism=single",
        f"data.path={model / 'good.jsonl'}", "trainer.seq_length=1024", "trainer.global_batch_size=4",
        "trainer.num_generations=0", "trainer.export=false", "scheduler=constant", "optimizer.lr=1e-5", "peft=none",
    ]  # fmt: skip


def worked(result):
    assert result.code == 0, result.err + result.log()[-4000:]
    return result


def test_a_resumed_run_is_the_whole_run_to_the_bit(posttrain, words, model, tmp_path):
    """Deterministic kernels, CUDA graphs, validation in between."""
    words = [*words, *SAVED, "data.validation_fraction=0.1", "trainer.deterministic=true", "trainer.max_steps=8",
             "checkpoint.save_interval=2"]  # fmt: skip
    whole = worked(posttrain(*words))
    again = worked(posttrain(*words, run_dir=cut(whole, tmp_path / "run", 4, tmp_path)))
    assert "resuming after step 4" in again.out
    same_run(whole, again)
    one, other = saved(again.run_dir, 8), saved(whole.run_dir, 8)
    assert one.keys() == other.keys() and not [name for name in one if not equal(one[name], other[name])]


def test_zero1_goes_on_with_transformer_engine(posttrain, words, tmp_path):
    """The distributed optimizer's own state is saved and loaded; losses within the noise of its kernels."""
    words = [*[word for word in words if not word.startswith("parallelism")], "parallelism=zero1",
             "parallelism.nproc_per_node=1", "trainer.max_steps=8", "checkpoint.save_interval=4", *SAVED]  # fmt: skip
    whole = worked(posttrain(*words, "data.validation_fraction=0.1"))
    again = worked(posttrain(*words, "data.validation_fraction=0.1", run_dir=cut(whole, tmp_path / "run", 4, tmp_path)))
    assert "resuming after step 4" in again.out
    for key in ("step", "batch", "lr"):
        assert [line.get(key) for line in again.metrics] == [line.get(key) for line in whole.metrics], key
    off = max(abs(a - b) / b for a, b in zip(again.losses, whole.losses, strict=True))
    print(f"\nzero1 resumed: losses off by {off:.1e} at most")
    assert off < 5e-3


def gaps(result, interval):
    """(median seconds between steps without a save, median extra seconds where one has happened)."""
    times = {line["step"]: line["time"] for line in result.metrics if "loss" in line}
    apart = {step: times[step] - times[step - 1] for step in times if step > 4 and step - 1 in times}
    plain = median(gap for step, gap in apart.items() if (step - 1) % interval)
    return plain, median(gap for step, gap in apart.items() if (step - 1) % interval == 0) - plain


def test_a_save_in_the_background_that_is_killed(posttrain, wide, started_with, record_property):
    """SIGKILL while it is written: the one before is whole and loads; what a save costs the training is measured."""
    interval = 6
    saving = [f"checkpoint.save_interval={interval}", "checkpoint.save_total_limit=2"]
    plain = worked(posttrain(*wide, *saving, "trainer.max_steps=19"))
    process, run_dir = started_with([*wide, *saving, "checkpoint.async_save=true"])
    root = run_dir / "checkpoints"
    deadline = time.monotonic() + 120
    while len(directories.checkpoints(root)) < 2 or not list((root / directories.PARTIAL).rglob("*.distcp")):
        assert process.poll() is None, finish(process, run_dir).err
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    killed = finish(process, run_dir)
    for name, result in (("sync", plain), ("async", killed)):
        step, stall = gaps(result, interval)
        record_property(name, {"step_s": step, "stall_s": stall})
        print(f"\n{name}: {step:.3f} s a step, a save costs {stall:.3f} s more")
    newest, skipped = directories.newest(root, hashes=True)
    assert newest is not None and not skipped
    last = directories.step_of(newest) + 2
    again = worked(
        posttrain(*wide, *saving, "checkpoint.async_save=true", f"trainer.max_steps={last}", run_dir=run_dir)
    )
    assert f"resuming after step {directories.step_of(newest)}" in again.out
    assert directories.newest(root, hashes=True) == (directories.directory(root, last), [])


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_batch_under_cuda_graphs(policy, posttrain, words, model):
    """One row's loss is NaN: its batch is left out, and everything that is trained stays finite."""
    import torch

    words = [*words, f"data.path={model / 'bad.jsonl'}", "trainer.cuda_graph=true", f"trainer.on_nonfinite={policy}",
             "trainer.max_steps=6", "checkpoint.save_interval=1"]  # fmt: skip
    result = worked(posttrain(*words))
    losses = {line["step"]: line["loss"] for line in result.metrics if "loss" in line}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    bad = [step for step, loss in losses.items() if loss is None]
    assert len(bad) == (1 if policy == "skip" else 0)
    if policy == "rollback":
        (one,) = json.loads((result.run_dir / "status.json").read_text())["rollbacks"]
        assert "is nan" in one["why"]
        print(f"\n{one}")
    state = saved(result.run_dir, 6)
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "embedding" not in name:
            assert torch.isfinite(value).all(), name


def test_a_hang_under_cuda_graphs(started):
    process, run_dir = started("trainer.cuda_graph=true", "launch.timeout_s=30", "trainer.on_nonfinite=skip")
    (rank,) = workers(process)
    rank.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert psutil.wait_procs([rank], timeout=60)[0], "the hanging rank was not ended"
    result = finish(process, run_dir)
    print(f"\nnoticed and ended after {time.monotonic() - begun:.1f} s")
    assert result.code == 1 and "no progress for launch.timeout_s=30 seconds" in result.err


def test_a_full_gpu(posttrain, wide):
    """What has the memory, and what would help, with numbers."""
    result = posttrain(*wide, "trainer.seq_length=4096", "trainer.micro_batch_size=256",
                       "trainer.global_batch_size=256", "trainer.max_steps=2")  # fmt: skip
    print("\n" + result.err)
    assert result.code == 2 and "Traceback" not in result.err, result.err + result.log()[-4000:]
    assert "the GPU's memory is full" in result.err and "weights 0." in result.err
    assert "trainer.micro_batch_size=" in result.err and " GiB -> " in result.err
