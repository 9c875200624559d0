"""`python -m posttrain.convert` as it is typed, and the export of a run checked by the run itself."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, environment

from posttrain.convert.checkpoints import find
from posttrain.convert.training_metadata import public_name

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def lora(posttrain, words):
    """A LoRA run on two processes."""
    result = posttrain(*words, "parallelism=tp2", "precision=fp32")
    assert result.code == 0, result.err + result.log()
    return result


@pytest.fixture
def convert(tmp_path):
    """Run `python -m posttrain.convert WORDS`; returns the finished process."""

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "posttrain.convert", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**environment(tmp_path), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path, timeout=300,
        )  # fmt: skip

    return run


def tensors(directory):
    from safetensors.torch import load_file

    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_run_verifies_its_export(lora):
    report = json.loads((lora.run_dir / "adapter" / "verification.json").read_text())
    assert report["logits"]["checked"] and report["logits"]["difference"] <= report["logits"]["tolerance"] == 1e-4
    assert report["tensors"]["against"] == "the base's matrices"


def test_dora_of_two_processes(posttrain, words):
    """Norms and magnitudes of divided matrices: the export is compared with the live model, or there is none."""
    result = posttrain(*words[:-1], "peft=dora", "parallelism=tp2", "precision=fp32")
    assert result.code == 0, result.err + result.log()
    report = json.loads((result.run_dir / "adapter" / "verification.json").read_text())
    assert report["logits"]["checked"] and report["tensors"]["count"] == 4 * 7 * 3


def test_what_to_do_with_a_checkpoint_of_megatron_fsdp(posttrain, words, convert, tmp_path):
    """It is refused with a command; that makes the export, which is named from then on."""
    run_dir = tmp_path / "a run"
    layout = ["parallelism=fsdp", "parallelism.nproc_per_node=2", "precision=fp32"]
    result = posttrain(*words, *layout, "trainer.max_steps=2", "trainer.export=false", run_dir=run_dir)
    assert result.code == 0, result.err + result.log()
    checkpoint = run_dir / "checkpoints" / "iter_0000002"
    refused = convert("export", checkpoint, tmp_path / "out")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    command = f"python -m posttrain --resume '{run_dir}' trainer.export=last"
    assert command in refused.stderr

    def run(words):
        python = [sys.executable, *words[1:]]
        return subprocess.run(python, capture_output=True, text=True, env=environment(tmp_path), timeout=300)

    resumed = run(shlex.split(command))
    assert resumed.returncode == 0, resumed.stderr
    export = run_dir / "adapter"
    asked = run(["python", "-m", "posttrain.generate", str(checkpoint), "hello"])
    for done in (asked, convert("export", checkpoint, tmp_path / "out")):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"format already: {export}, of step 2; ask it: python -m posttrain.generate '{export}'" in done.stderr
        assert f"python -m posttrain.convert merge '{export}' DIR" in done.stderr
    merged = convert("merge", export, tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr


def test_another_run_goes_on_from_the_adapter(lora, posttrain, words):
    go_on = [word for word in words if not word.startswith("model.path")]
    result = posttrain(*go_on, f"model.path={lora.run_dir / 'adapter'}", "precision=fp32")
    assert result.code == 0, result.err + result.log()
    assert result.summary["val_loss_before"] == pytest.approx(lora.summary["val_loss_after"], rel=1e-5)
    config = json.loads((result.run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == next(word for word in words if "model.path" in word).partition("=")[2]


def test_checkpoint_to_adapter_to_whole_model(lora, tiny, convert, tmp_path):
    where = lora.run_dir / "checkpoints"
    assert {find(path).directory for path in (lora.run_dir, where, where / "iter_0000004")} == {where / "iter_0000004"}
    done = convert("export", f"checkpoint={where}", f"convert.out={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"exported: {where / 'iter_0000004'} (step 4, the newest)\nwritten: {tmp_path / 'again'}\n"
    again, first = tensors(tmp_path / "again"), tensors(lora.run_dir / "adapter")
    assert again.keys() == first.keys() and all(again[name].equal(first[name]) for name in first)
    done = convert("merge", f"checkpoint={lora.run_dir}", f"convert.out={tmp_path / 'merged'}")
    assert done.returncode == 0, done.stderr
    assert f"merged: {lora.run_dir / 'adapter'} (step 4) into {public_name(str(tiny))}\n" in done.stdout
    changed = {name for name, t in tensors(tmp_path / "merged").items() if not t.equal(tensors(tiny)[name])}
    assert {name.rpartition(".layers.")[2][2:] for name in changed} == {
        "self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip


def test_a_run_whose_base_was_moved(posttrain, words, tiny, convert, tmp_path):
    """Where it is now is said to the export, which knows the weights that the adapter was trained on."""
    from safetensors.torch import save_file

    gone = shutil.copytree(tiny, tmp_path / "gone")
    result = posttrain(*words, f"model.path={gone}")
    assert result.code == 0, result.err + result.log()
    moved = gone.rename(tmp_path / "moved")
    done = convert("export", str(result.run_dir), "out")
    assert done.returncode == 2 and "convert.base=BASE" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = convert("export", str(result.run_dir), "out", f"convert.base={moved}")
    assert done.returncode == 0, done.stderr
    again, first = tensors(tmp_path / "out"), tensors(result.run_dir / "adapter")
    assert again.keys() == first.keys() and all(again[name].equal(first[name]) for name in first)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    save_file({name: tensor + 1 for name, tensor in tensors(moved).items()}, moved / "model.safetensors")
    done = convert("export", str(result.run_dir), "other", f"convert.base={moved}")
    assert done.returncode == 2 and "is not the model that the run of" in done.stderr, done.stderr


def test_there_and_back(tiny, convert, tmp_path):
    done = convert("import", f"model.path={tiny}", f"convert.out={tmp_path / 'megatron'}")
    assert done.returncode == 0, done.stderr
    done = convert("export", f"checkpoint={tmp_path / 'megatron'}", f"convert.out={tmp_path / 'hf'}")
    assert done.returncode == 0, done.stderr
    before, after = tensors(tiny), tensors(tmp_path / "hf")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert {"tokenizer.json", "generation_config.json", "verification.json"} <= {
        f.name for f in (tmp_path / "hf").iterdir()
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import model.path=nowhere/at/all convert.out=out", "there is no such directory"),
        ("import model.path={tiny} convert.out={tiny}", "already exists"),
        ("export checkpoint={tiny} convert.out=out", "is in Hugging Face's form already"),
        ("merge checkpoint={tiny} convert.out=out", "is a whole model already"),
        ("export convert.out=out", "`checkpoint`: has no value"),
        ("export checkpoint=x convert.oot=out", "did you mean"),
    ],
)
def test_one_line_and_exit_code_2(words, message, tiny, convert, tmp_path):
    done = convert(*words.format(tiny=tiny).split())
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.glob("*out*"))
