"""Attempts on what reads a stranger's files, most in milliseconds: a UserError comes out, or what is read is harmless.

Each case calls the reader that the commands use.
"""

import json
import os
import subprocess
import time

import pytest
import yaml
from omegaconf.errors import OmegaConfBaseException

from posttrain.config import frozen, yaml_file
from posttrain.config.composition import compose
from posttrain.data import hub_datasets
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.models.headers import read_json
from posttrain.primus import read as primus
from posttrain.report import write_report
from posttrain.report.trials import read_trials
from posttrain.sweep.trial import Trial

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
DIGITS = "9" * 400


YAML = {
    "a date that isn't": "a: 2020-99-99\n",
    "bytes": "a: !!binary aGVsbG8=\n",
    "a set": "a: !!set {x}\n",
    "an ordered map": "a: !!omap [x: 1]\n",
    "pairs": "a: !!pairs [x: 1]\n",
    "a whole number of 400 digits": f"a: {DIGITS}\n",
    "of 6,000 digits": f"a: {'9' * 6000}\n",
    "of 6,000 hexadecimal digits": f"a: 0x{'f' * 6000}\n",
    "of 60,000 bits": f"a: 0b{'1' * 60000}\n",
    "in base 60": f"a: 1{':59' * 400}\n",
    "a billion laughs": LAUGHS,
    "an alias of itself": "a: &a [*a]\n",
    "an alias of nothing": "a: *b\n",
    "5,000 lists": "a: " + "[" * 5000 + "]" * 5000,
    "5,000 mappings": "{a: " * 5000 + "1" + "}" * 5000,
    "a list as a key": "? [a]\n: b\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "an object": "a: !!python/object/apply:os.system [touch $CANARY]\n",
    "a name": "a: !!python/name:os.system\n",
    "a module": "a: !!python/module:imported\n",
    "a tuple": "a: !!python/tuple [1]\n",
    "a tag of its own": "a: !payload.fire {}\n",
    "a tag by a directive": "%TAG !e! tag:yaml.org,2002:python/object/apply:\n---\na: !e!os.system [touch $CANARY]\n",
    "half a character": 'a: "\\ud800"\n',
    "a zero byte": "a: \0\n",
    "a tab": "a:\n\t- 1\n",
    "another version": "%YAML 9.9\n---\na: 1\n",
}
TAKEN = ("a date that isn't", "another version", "a tag by a directive")


@pytest.mark.parametrize("what", YAML)
def test_yaml(what, canary, tmp_path):
    """Read, if at all, as what JSON can hold, and as OmegaConf reads it."""
    (tmp_path / "config.yaml").write_text(YAML[what], encoding="utf-8")
    for reader in (yaml_file.parse, lambda file: frozen.read(file.parent)):
        try:
            found = reader(tmp_path / "config.yaml")
        except UserError as error:
            assert "config.yaml" in str(error)
        else:
            assert what in TAKEN or reader is not yaml_file.parse
            str(found)


PRIMUS = "framework: megatron_bridge\n"


@pytest.mark.parametrize("name", ["/etc/x.yaml", "../../x", "a/b", "[a, b]", "..", "'a\\nb'"])
def test_a_preset_of_primus_is_a_plain_name(name, tmp_path):
    module = f"{{framework: megatron_bridge, model: {name}, overrides: {{train_iters: 3}}}}"
    (tmp_path / "x.yaml").write_text(f"modules: {{post_trainer: {module}}}\n")
    with pytest.raises(UserError, match="name of a preset"):
        primus.read_primus(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "default", ["2020-99-99", "[" * 3000 + "]" * 3000, "9" * 6000, "[&a [1], *a, *b]", "!!set [x]"]
)
def test_a_default_in_primus_that_is_no_yaml_is_text(default, tmp_path):
    (tmp_path / "x.yaml").write_text(PRIMUS + json.dumps({"foo": "${NOT_SET_ANYWHERE:" + default + "}"})[1:-1] + "\n")
    assert isinstance(primus.read_primus(tmp_path / "x.yaml").settings["foo"], str)


CONFIGS = {
    "texts that double": {f"a{i}": f"${{.a{i + 1}}}${{.a{i + 1}}}" for i in range(40)} | {"a40": "x"},
    "mappings that double": {f"a{i}": {"x": f"${{..a{i + 1}}}", "y": f"${{..a{i + 1}}}"} for i in range(30)}
    | {"a30": 1},
    "a chain of 3,000": {f"a{i}": f"${{.a{i + 1}}}" for i in range(3000)} | {"a3000": "x"},
    "nested 500 times": {"a": "${" * 500 + "x" + "}" * 500},
    "20,000 in a text": {"a": "${oc.decode:x}" * 20000},
}


def composed(folder, text, *words):
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "evil.yaml").write_text("# @package _global_\n" + text)
    return compose([f"hydra.searchpath=[file://{folder}]", "experiment=evil", *words])


@pytest.mark.parametrize("what", CONFIGS)
def test_interpolations_that_fill_the_memory(what, tmp_path):
    started = time.monotonic()
    with pytest.raises((UserError, OmegaConfBaseException), match=r"interpolation|recursion|values"):
        composed(tmp_path, yaml.safe_dump({"template": {"variables": CONFIGS[what]}}))
    assert time.monotonic() - started < 60  # a second or two; without a limit it never ends


@pytest.mark.parametrize(
    "text",
    [
        "hydra: null",
        "defaults: [/experiment/evil]",
        "hydra: {sweeper: {params: {seed: 'range(0,100000000000)'}}}",
        "hydra: {sweeper: {params: {seed: 'range(0,200)', peft.rank: 'range(1,200)'}}}",
        "defaults: ['/../outside@template.variables']",
        "defaults: ['../../outside@template.variables']",
        "defaults: ['/template/linked@template.variables']",
    ],
)
def test_composition(text, tmp_path):
    """Files elsewhere are not read, endless ones end."""
    site = tmp_path / "site"
    (site / "template").mkdir(parents=True)
    (tmp_path / "outside.yaml").write_text("pin: 1234\n")
    (site / "template" / "linked.yaml").symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(UserError):
        composed(site, text)


REPORTS = {
    "a date": ("config.yaml", "a: 2020-01-01\n"),
    "a number of 400 digits in a summary": ("summary.json", f'{{"val_loss_after": {DIGITS}}}'),
    "in a curve": ("metrics.jsonl", f'{{"step": 1, "loss": {DIGITS}}}\n'),
    "as a step": ("metrics.jsonl", f'{{"step": {DIGITS}, "loss": 1}}\n'),
    "a clock that overflows": (
        "metrics.jsonl",
        '{"step":1,"loss":1,"time":-1e308}\n{"step":2,"loss":1,"time":1e308}\n',
    ),
    "a summary that is a list": ("summary.json", "[1]"),
    "a loss that is a list": ("summary.json", '{"val_loss_after": [1]}'),
    "a status that is a list": ("status.json", "[1]"),
    "an escape in a status": ("status.json", '{"state": "\\u001b[31m"}'),
    "half a character in a status": ("status.json", '{"state": "\\ud800", "error": "\\udfff"}'),
    "half a character in a sample": ("samples.json", '[{"prompt": "\\ud800"}]'),
    "a key that is markup": ("config.yaml", "'[/x]': 1\n"),
    "a key with an escape": ("config.yaml", '"\\e[31m": 1\n'),
    "a key that is HTML": ("config.yaml", "'<script>alert(1)</script>': 1\n"),
}


@pytest.mark.parametrize("what", REPORTS)
def test_a_report(what, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 1\n")
        (tmp_path / name / "status.json").write_text('{"state": "finished"}')
    file, text = REPORTS[what]
    (tmp_path / "a" / file).write_text(text)
    page = write_report(tmp_path).read_text()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown + page and "<script>alert" not in page


def test_folders_that_go_deep_or_have_no_name_in_utf8(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "a" / "status.json").write_text("{}")
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff")
    assert "\\udcff" in write_report(tmp_path).read_text()
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("dddd", dir_fd=here)
        here, before = os.open("dddd", os.O_RDONLY, dir_fd=here), here
        os.close(before)
    os.close(here)
    try:
        with pytest.raises(UserError, match="too long"):
            read_trials(tmp_path)
    finally:
        subprocess.run(["rm", "-r", "dddd"], cwd=tmp_path, check=True)  # pytest could not


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
@pytest.mark.parametrize("what", ["pipe", "device", "huge"])
def test_files_of_a_model_that_never_end(what, name, tmp_path):
    if what == "pipe":
        os.mkfifo(tmp_path / name)
    elif what == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        with (tmp_path / name).open("w") as file:
            file.truncate(100 << 30)
    with pytest.raises(UserError, match=r"not a plain file|MiB|not a regular file|leads out"):
        read_json(tmp_path / name)
    with pytest.raises(UserError):
        ChatTemplate(name="custom", file=str(tmp_path / name)).read()
    with pytest.raises(UserError):
        yaml_file.read(tmp_path / name)


@pytest.mark.parametrize("text", [LAUGHS, "[1]", "a: 2020-99-99", "a: !!set {x}"])
def test_a_trial_that_is_there(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.yaml|other settings"):
        Trial("t", tmp_path, compose()).already_finished()


@pytest.mark.parametrize("name", ["/etc", "../x", "./x", "a/b/c", "", "a b/c", "-/x", "a/..", "~/x"])
def test_data_of_a_hub_are_not_of_a_folder(name):
    with pytest.raises(UserError):
        list(hub_datasets.rows(f"hf://{name}"))
