"""Mistakes and damage: one line that names the file, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from posttrain.config.composition import compose
from posttrain.convert.__main__ import with_keys
from posttrain.convert.checkpoints import find
from posttrain.convert.publish import check_apart
from posttrain.errors import UserError
from posttrain.models import HFModel


@pytest.fixture(scope="module")
def imported(megatron, tmp_path_factory):
    """A tiny Llama as a Megatron checkpoint."""
    from families import save_random
    from tiny_tokenizer import byte_tokenizer

    from posttrain.convert.megatron import import_model

    root = tmp_path_factory.mktemp("imported")
    save_random("llama", root / "hf")
    byte_tokenizer().save_pretrained(root / "hf")
    import_model(HFModel(path=str(root / "hf")), root / "megatron")
    return root


def damage_hf(what, directory):
    """Damage a Hugging Face directory in one way."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    if what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "missing":
        index = {"weight_map": dict.fromkeys(load_file(weights), "model-00002-of-00002.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "config.json says":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    elif what == "no bridge":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "BloomForCausalLM"))
    elif what == "pickle":
        weights.rename(directory / "pytorch_model.bin")
    elif what == "layers":
        kept = {name: t for name, t in load_file(weights).items() if ".layers.3." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    elif what == "unquantised":
        import torch

        low = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(weights).items()}
        save_file(low, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "what", ["cut short", "missing", "config.json says", "no bridge", "pickle", "layers", "unquantised"]
)
def test_import(what, imported, tmp_path):
    from posttrain.convert.megatron import import_model

    directory = shutil.copytree(imported / "hf", tmp_path / "hf")
    damage_hf(what, directory)
    with pytest.raises(UserError, match=what):
        import_model(HFModel(path=str(directory)), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "metadata.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_half_written_checkpoint(file, how, imported, tmp_path):
    copy = shutil.copytree(imported / "megatron", tmp_path / "megatron")
    found = copy / "iter_0000000" / file
    found.write_bytes(found.read_bytes()[:-20]) if how == "cut" else found.unlink()
    with pytest.raises(UserError, match=rf"{file} .*(bytes instead of|missing).*half written"):
        find(copy)


def test_checkpoint_that_was_killed_while_saved(imported, tmp_path):
    copy = shutil.copytree(imported / "megatron", tmp_path / "megatron")
    (copy / "iter_0000000").rename(copy / ".partial")
    with pytest.raises(UserError, match="no finished checkpoint"):
        find(copy)


@pytest.mark.parametrize(
    "change",
    [{"intermediate_size": 64}, {"num_hidden_layers": 6}, {"num_key_value_heads": 4}, {"attention_bias": True}],
)
def test_checkpoint_of_another_model(change, imported, tmp_path):
    from posttrain.convert.megatron import export_checkpoint

    copy = shutil.copytree(imported / "megatron", tmp_path / "megatron")
    config = copy / "huggingface" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match="iter_0000000: not a checkpoint of"):
        export_checkpoint(find(copy), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_directory_without_a_model(imported, tmp_path):
    shutil.copytree(imported / "megatron" / "iter_0000000", tmp_path / "checkpoints" / "iter_0000000")
    with pytest.raises(UserError, match="says what model it is of"):
        find(tmp_path)
    with pytest.raises(UserError, match="there is no such directory"):
        find(tmp_path / "elsewhere")


def test_what_is_there_is_kept_until_the_new_is_whole(imported, tmp_path):
    from posttrain.convert.publish import publishing

    out = tmp_path / "out"
    with publishing(out) as scratch:
        (scratch / "file").write_text("old")
    with pytest.raises(UserError, match=r"convert.overwrite=true"), publishing(out):
        pass
    with pytest.raises(ZeroDivisionError), publishing(out, overwrite=True) as scratch:
        (scratch / "file").write_text("half")
        raise ZeroDivisionError
    assert (out / "file").read_text() == "old"
    with publishing(out, overwrite=True) as scratch:
        (scratch / "file").write_text("new")
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_an_export_reads_is_not_replaced(imported, tmp_path, monkeypatch, capsys):
    from posttrain.convert.__main__ import main

    copy = shutil.copytree(imported / "megatron", tmp_path / "megatron")
    for out in (copy / "iter_0000000", copy / "huggingface"):
        before = sorted(out.iterdir())
        monkeypatch.setattr("sys.argv", ["convert", "export", str(copy), str(out), "convert.overwrite=true"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "which is read, would be replaced" in capsys.readouterr().err
        assert sorted(out.iterdir()) == before


def test_only_what_is_there_is_kept_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_apart(Path("owner"), Path("owner/name"))  # of a hub
    Path("owner/name").mkdir(parents=True)
    with pytest.raises(UserError, match="would be replaced"):
        check_apart(Path("owner"), Path("owner/name"))


def test_an_adapter_is_not_imported(tmp_path, monkeypatch, capsys):
    """A Megatron checkpoint is of a whole model: it would have been the base's alone."""
    from posttrain.convert.__main__ import main

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    monkeypatch.setattr("sys.argv", ["convert", "import", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "is an adapter" in (err := capsys.readouterr().err) and "convert merge" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["exprt", "checkpoint=a"], "say one of import, export, merge, push"),
        (["export", "merge", "checkpoint=a"], "say one of"),
        (["export", "checkpoint=a", "model.path=b"], "`model.path=b`: export takes the model from its checkpoint"),
        (["import", "model.path=a"], "`convert.out`: has no value"),
        (["export", "a", "b", "c"], "c: is one argument too many: python -m posttrain.convert export --help"),
        (["merge", "no/run", "out"], "no/run"),
        (["push", "no/run", "nobody/x"], "HF_TOKEN"),
        (["import", "no/model", "out"], "no/model"),
        (["export", "checkpoint=a", "convert.ot=b"], "did you mean `convert.out`"),
    ],
)
def test_words_of_the_command(words, message, monkeypatch, capsys):
    from posttrain.convert.__main__ import main

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("sys.argv", ["convert", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err


def test_words_without_a_key_are_the_directories():
    assert with_keys("merge", ["my run", "out", "convert.dtype=float32"]) == [
        "convert.checkpoint='my run'", "convert.out=out", "convert.dtype=float32",
    ]  # fmt: skip
    assert with_keys("import", ["a/b", "out"]) == ["model.path=a/b", "convert.out=out"]
    assert with_keys("push", ["--config-dir", "conf", "run", "a/b"])[2:] == [
        "convert.checkpoint=run",
        "convert.repo=a/b",
    ]
    assert with_keys("export", ["checkpoint=run", "convert.out=x"]) == ["convert.checkpoint=run", "convert.out=x"]


def test_the_directory_of_a_trial_is_no_override(tmp_path, monkeypatch):
    """A sweep names its trials by their overrides; the best one is what a refused sweep says to give."""
    monkeypatch.chdir(tmp_path)
    trial = "optimizer.lr=0.1,peft.rank=8"
    (tmp_path / trial).mkdir()
    for word in (trial, f"./{trial}", f"{tmp_path}/{trial}"):
        words = with_keys("merge", [word, "./lr=0.1", "convert.overwrite=true"])
        convert = compose(words, "convert").convert
        assert (convert.checkpoint, convert.out, convert.overwrite) == (word, "./lr=0.1", True)
    assert with_keys("merge", ["no,such=0.1"]) == ["no,such=0.1"]


def test_each_command_has_a_help_of_its_own(monkeypatch, capsys):
    from posttrain.convert.__main__ import COMMANDS, main

    texts = {}
    for name in COMMANDS:
        monkeypatch.setattr("sys.argv", ["convert", name, "--help"])
        main()
        texts[name] = capsys.readouterr().out
        assert f"python -m posttrain.convert {name} " in texts[name]
    assert len(set(texts.values())) == len(COMMANDS)
    assert "convert.base" in texts["merge"] and "convert.base" not in texts["import"]
    assert "convert.repo" not in texts["import"] and "convert.out" not in texts["push"]
