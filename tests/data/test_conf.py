"""Every file of conf/data and conf/template: composes, is built, and explains each of its options."""

import re

import pytest
from hydra.utils import instantiate

from posttrain.config.composition import CONF_DIR, compose
from posttrain.data import TrainingData
from posttrain.data.checks import check
from posttrain.data.jinja import compile_template
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError
from posttrain.spec.checks import check_objective

FORMATS = sorted(file.stem for file in (CONF_DIR / "data").glob("*.yaml"))
TEMPLATES = sorted(file.stem for file in (CONF_DIR / "template").glob("*.yaml"))


def test_all_are_there():
    formats = {"alpaca", "custom", "demo", "dolly", "messages", "oasst", "prompt_completion", "sharegpt"}
    assert formats <= set(FORMATS)
    assert {"alpaca", "chatml", "custom", "gemma", "llama2", "llama3", "mistral", "model"} <= set(TEMPLATES)


@pytest.mark.parametrize("name", FORMATS)
def test_data(name):
    words = [f"data={name}", "data.path=rows.jsonl"]
    if name == "custom":
        words += ["data.format.prompt=q", "data.format.answer=a"]
    data = instantiate(compose(words).data)
    assert isinstance(data, TrainingData) and (hasattr(data.format, "conversations") or hasattr(data.format, "read"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name):
    words = [f"template={name}", *(["template.file=own.jinja"] if name == "custom" else [])]
    template = instantiate(compose(words).template)
    assert isinstance(template, ChatTemplate) and template.name == name
    if template.jinja is not None:
        compile_template(template.jinja, name)


@pytest.mark.parametrize("path", ["data/base/options.yaml", "template/base/options.yaml"])
def test_each_option_is_explained_and_no_other_exists(path):
    text = (CONF_DIR / path).read_text()
    keys = [line.partition(":")[0] for line in text.splitlines() if re.match(r"[a-z]", line)]
    known = {"data": TrainingData, "template": ChatTemplate}[path.split("/")[0]]
    assert set(keys) | {"format"} >= set(known.__dataclass_fields__) - {"_target_"} and len(keys) == len(set(keys))
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if re.match(r"[a-z]", line) and line.partition(":")[0] != "max_validation_rows":
            assert lines[at - 1].startswith("#"), f"{path}: {line} has no comment"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=alpaca"], "data.path: give the file"),
        (["data=alpaca", "data.path=no/such.json"], "data.path=no/such.json: there is no such"),
        (["data=alpaca", "data.path=no/such.json", "data.train_on=x"], "data.train_on=x: must be one of"),
        (["data.max_length=9999"], "data.max_length=9999: above trainer.seq_length"),
        (["data=custom", "data.path=x"], "data.format: give either prompt and answer"),
        (["template=custom"], "template.file: give the file"),
        (["template=custom", "template.file=no.jinja"], "template.file=no.jinja: No such file"),
        (["template=chatml", "template.bos=maybe"], "template.bos=maybe: must be"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(words, message):
    with pytest.raises(UserError, match=message):
        cfg = compose(words)
        data, _ = check(cfg)
        check_objective(cfg, data)


def test_the_demo_has_no_mistakes():
    check(compose([]))
