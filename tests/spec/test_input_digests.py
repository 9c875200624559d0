"""What belongs to a trial's identity besides its configuration."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from posttrain.config.composition import compose
from posttrain.spec import inputs


@pytest.fixture
def folder(tmp_path):
    """A model of one matrix with a template, rows to train on and rows to validate on."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}")
    save_file({"a": np.zeros((4, 4), np.float32)}, tmp_path / "model/model.safetensors")
    for name in ("rows", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    return tmp_path


def digests(folder, *words):
    return inputs.digests(compose([
        "model=hf", f"model.path={folder / 'model'}", "data=messages", f"data.path={folder / 'rows.jsonl'}",
        f"data.validation_path={folder / 'validation.jsonl'}", f"cache_dir={folder / 'cache'}", *words,
    ]))  # fmt: skip


def replaced(file):
    file.write_text(file.read_text() + " ")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("data", "rows.jsonl"),
        ("validation", "validation.jsonl"),
        ("template", "model/chat_template.jinja"),
        ("weights", "model/config.json"),
    ],
)
def test_each_file_counts_for_what_it_is(folder, name, file):
    before = digests(folder)
    assert set(before) == {"data", "validation", "template", "weights"}
    assert digests(folder, "seed=7", "optimizer.lr=1", "logger=tensorboard") == before
    replaced(folder / file)
    assert inputs.changed(before, digests(folder)) == [name]


def test_weights_of_the_same_size(folder):
    before = digests(folder)
    save_file({"a": np.ones((4, 4), np.float32)}, folder / "model/model.safetensors")
    assert inputs.changed(before, digests(folder)) == ["weights"]


def test_rows_that_are_held_out_are_of_the_training_file(folder):
    split = ["data.validation_path=null", "data.validation_fraction=0.1"]
    before = digests(folder, *split)
    assert digests(folder, *split, "seed=7") == before  # the split is the same
    assert inputs.changed(before, digests(folder, *split, "data.seed=7")) == ["validation"]
    assert inputs.changed(before, digests(folder, "data.validation_path=null", "data.validation_fraction=0.2")) == [
        "validation"
    ]
    replaced(folder / "rows.jsonl")
    assert inputs.changed(before, digests(folder, *split)) == ["data", "validation"]


def test_a_template_of_ones_own(folder):
    (folder / "own.jinja").write_text("a")
    words = ["template=custom", f"template.file={folder / 'own.jinja'}"]
    before = digests(folder, *words)
    replaced(folder / "own.jinja")
    assert inputs.changed(before, digests(folder, *words)) == ["template"]


def test_what_is_missing_is_left_out(folder):
    (folder / "rows.jsonl").unlink()
    assert set(digests(folder)) == {"validation", "template", "weights"}
    assert inputs.changed({"data": "x"}, digests(folder)) == []
