"""From where a run resumes, what may change, and which lines of its metrics stay."""

import fcntl
import json
import math
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from posttrain.checkpoint import directories, resume
from posttrain.checkpoint.progress import FILE, Progress
from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.spec import resumption
from posttrain.train.metrics import kept_lines
from posttrain.utils import rundir
from posttrain.utils.atomic_files import write_text


@pytest.fixture(scope="module")
def cfg():
    return compose(["trainer.max_steps=4"])


def save(run_dir, step, cfg, progress=None):
    """A checkpoint as far as this project's own files go; its progress as such, or as the text of its file."""
    partial = directories.directory(run_dir / "checkpoints" / directories.PARTIAL, step)
    partial.mkdir(parents=True)
    write_text(partial / resume.CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
    (partial / "train_state.pt").write_bytes(b"state")
    if isinstance(progress, str):
        (partial / FILE).write_text(progress)
    elif progress is not None:
        progress.write(partial)
    directories.finish(run_dir / "checkpoints", step)
    return directories.directory(run_dir / "checkpoints", step)


def test_where_a_run_goes_on(tmp_path, cfg):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert resume.find(cfg, ours) is None
    other = compose(["trainer.max_steps=4", f"run.resume={theirs}"])
    with pytest.raises(UserError, match="there is no finished checkpoint"):
        resume.find(other, ours)
    save(theirs, 2, cfg)
    newest = save(theirs, 4, cfg)
    assert resume.find(other, ours) == newest
    assert resume.find(cfg, ours) is None
    own = save(ours, 3, cfg)  # a run that began from another's resumes from its own
    assert resume.find(other, ours) == resume.find(cfg, ours) == own
    with pytest.raises(UserError, match="resume=never"):
        resumption.check(compose(["trainer.max_steps=4", "run.resume=never"]), ours)


def test_a_template_that_nothing_is_rendered_with_may_differ(tmp_path):
    text = ["objective=text", "data.path=a.txt"]
    save(tmp_path / "text", 2, compose([*text, "template=chatml"]))
    resumption.check(compose(text), tmp_path / "text")
    save(tmp_path / "sft", 2, compose(["template=chatml"]))
    with pytest.raises(UserError, match=r"template\.name: chatml -> model"):
        resumption.check(compose([]), tmp_path / "sft")


@pytest.mark.parametrize("word", ["optimizer.lr=3.3e-5", "trainer.global_batch_size=24", "seed=1", "peft.rank=4",
                                  "scheduler=linear", "trainer.seq_length=1032", "data.packing=false", "peft=none",
                                  "+trainer.megatron.model.init_method_std=0.1", "model.path=elsewhere"])  # fmt: skip
def test_a_changed_configuration_is_refused(tmp_path, cfg, word):
    save(tmp_path, 2, cfg)
    with pytest.raises(UserError, match="was trained with another configuration") as refused:
        resumption.check(compose(["trainer.max_steps=4", word]), tmp_path)
    key = word.lstrip("+").partition("=")[0]
    assert f"\n  {key.partition('.')[0]}" in str(refused.value)


@pytest.mark.parametrize("word", ["trainer.max_steps=9", "logger=tensorboard", "launch.max_restarts=3",
                                  "checkpoint.save_total_limit=2", "trainer.micro_batch_size=2", "run.name=x",
                                  "parallelism.nproc_per_node=2", "trainer.export=false", "cache_dir=/x",
                                  "parallelism=tp2", "parallelism=pp2", "parallelism=tp2_pp2"])  # fmt: skip
def test_harmless_changes_are_not(tmp_path, cfg, word):
    save(tmp_path, 2, cfg)
    resumption.check(cfg, tmp_path)
    resumption.check(compose(["trainer.max_steps=4", word]), tmp_path)


@pytest.mark.parametrize("used", [False, True])
def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path, cfg, used):
    """What Hydra has recorded of it too: the next `--resume` starts from that."""
    save(tmp_path, 2, cfg)
    words = ["parallelism=zero1", "trainer.max_steps=4"]
    (tmp_path / ".hydra").mkdir()
    record = tmp_path / ".hydra" / "overrides.yaml"
    record.write_text(json.dumps(words))
    message = "parallelism.distributed_optimizer: False -> True\n"
    with open(tmp_path / rundir.LOCK, "wb") as lock:
        if used:
            fcntl.flock(lock, fcntl.LOCK_EX)
            message = f"hydra.run.dir={tmp_path}: another run is using this directory; choose another\n"
        command = [sys.executable, "-m", "posttrain", "--resume", str(tmp_path), "seed=1"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert json.loads(record.read_text()) == words
    assert {path.name for path in tmp_path.iterdir()} == {".hydra", rundir.LOCK, "checkpoints"}


@pytest.mark.parametrize("words", [["parallelism=cp2"], ["parallelism=zero1"], ["parallelism=fsdp"]])
def test_layouts_that_pack_or_save_otherwise_are_refused(tmp_path, cfg, words):
    save(tmp_path, 2, cfg)
    with pytest.raises(UserError, match="parallelism"):
        resumption.check(compose(["trainer.max_steps=4", *words]), tmp_path)


def test_a_divided_optimizer_stays_divided_in_the_same_way(tmp_path):
    save(tmp_path, 2, compose(["trainer.max_steps=4", "parallelism=zero1"]))
    words = ["trainer.max_steps=4", "parallelism=zero1", "+parallelism.tensor_model_parallel_size=2"]
    with pytest.raises(UserError, match="tensor_model_parallel_size"):
        resumption.check(compose(words), tmp_path)


def test_a_divided_optimizer_on_another_number_of_processes_says_what_keeps_it(tmp_path):
    save(tmp_path, 2, compose(["trainer.max_steps=4", "parallelism=zero1"]))
    with pytest.raises(UserError) as refused:
        resumption.check(compose(["trainer.max_steps=4", "parallelism=single"]), tmp_path)
    override = "parallelism.distributed_optimizer=true"
    assert str(refused.value).endswith(f"\n  {override} beside the layout keeps it")
    resumption.check(compose(["trainer.max_steps=4", "parallelism=single", override]), tmp_path)


def test_fewer_steps_than_were_trained_are_refused_before_the_run_starts(tmp_path, cfg):
    save(tmp_path, 3, cfg)
    with pytest.raises(UserError, match=r"2 steps are asked for, and .* has been trained for 3"):
        resumption.check(compose(["trainer.max_steps=2"]), tmp_path)


@pytest.mark.parametrize("words", [["trainer.epochs=1"], ["trainer.epochs=1.6"], ["trainer.epochs=0.1"], []])
def test_fewer_epochs_than_were_trained(tmp_path, words):
    """Two epochs of 9 rows in batches of 4 are 6 steps; no epochs are one."""
    common = ["trainer.max_steps=null", "trainer.global_batch_size=4"]
    cfg = compose([*common, "trainer.epochs=2"])
    save(tmp_path, 6, cfg, Progress(rows=9))
    resumption.check(cfg, tmp_path)
    resumption.check(compose([*common, "trainer.epochs=1.7"]), tmp_path)  # 5.1 steps: the sixth has begun
    fewer = compose([*common, *words])
    with pytest.raises(UserError, match=r"trainer\.epochs=.*: \d steps are asked for, and .* has been trained for 6"):
        resumption.check(fewer, tmp_path)


def test_a_checkpoint_that_does_not_say_its_rows_is_left_to_the_ranks(tmp_path):
    for number, text in enumerate(['{"rows": null}', '{"rows": -3}', '{"rows": "9"}', "{}"]):
        root = tmp_path / str(number)
        save(root, 6, compose(["trainer.max_steps=null", "trainer.epochs=2"]), text)
        resumption.check(compose(["trainer.max_steps=null", "trainer.epochs=1"]), root)


def test_a_checkpoint_without_optimizer_state_is_not_gone_on_from(tmp_path):
    cfg = compose(["trainer.max_steps=4", "checkpoint.save_optimizer=false"])
    save(tmp_path, 2, cfg)
    with pytest.raises(UserError, match="save_optimizer=false"):
        resumption.check(cfg, tmp_path)


def test_totals_come_back(tmp_path):
    progress = Progress(5, 6, 1.25, 0.5, float("nan"), [{"prompt": "p", "before": "b"}])
    progress.validations = [(1, 2.5), (2, float("inf"))]
    progress.write(tmp_path)
    again = Progress()
    again.read(tmp_path)
    assert (again.supervised_tokens, again.tokens, again.seconds, again.train_loss) == (5, 6, 1.25, 0.5)
    assert again.val_loss_before is None and again.samples == progress.samples
    assert again.validations[0] == (1, 2.5) and math.isnan(again.validations[1][1])  # JSON has no infinities


def test_metrics_of_what_was_lost_are_dropped():
    lines = [{"step": 0, "val_loss": 3}, {"step": 1, "loss": 2}, {"step": 2, "loss": 1}, {"step": 2, "val_loss": 2},
             {"step": 3, "loss": 1}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'

    def kept(first_step, ended=False):
        return [json.loads(line) for line in kept_lines(text, first_step, ended).splitlines()]

    assert kept(2) == lines[:4]
    assert kept(3) == lines
    assert kept(2, ended=True) == lines[:3]  # the last validation of a run that had ended is done again
    assert kept(0) == []


def test_metrics_keep_characters_that_end_lines_elsewhere():
    """str.splitlines would cut at them, and both halves would be lost."""
    line = json.dumps({"step": 1, "answer": "one\u2028two\x85three"}, ensure_ascii=False) + "\n"
    assert kept_lines(line + "[" * 100_000, 3, False) == line


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokens", "5"),
        ("losses", {}),
        ("seconds", []),
        ("inputs", ["data"]),
        ("validations", [[1]]),
        ("validations", [7]),
    ],
)
def test_totals_of_a_wrong_type_are_refused(tmp_path, name, value):
    (tmp_path / "progress.json").write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=f"`{name}` has the wrong type"):
        Progress().read(tmp_path)
