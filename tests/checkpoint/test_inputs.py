"""A run that resumes finds the rows and weights that it was trained with, or is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from posttrain.checkpoint import fingerprints
from posttrain.data.training_data import Splits
from posttrain.errors import UserError
from posttrain.models import HFModel


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = np.random.default_rng(0).standard_normal((3, 400, 1000)).astype(np.float32)
    for shard in (0, 1):
        save_file({f"a{shard}": weights[0], f"b{shard}": weights[1 + shard]}, tmp_path / f"model-{shard}.safetensors")
    return tmp_path


def inputs(directory, files=("f00",), tokens=9, adapter=True, validation=()):
    """The digests of a run of the model in `directory`."""
    digests = {"data.path": list(files), "data.validation_path": list(validation)}
    report = {"sha256": digests, "train": {"tokens": tokens}}
    return fingerprints.inputs_of(Splits([1, 2], None, report), HFModel(path=str(directory)), adapter)


def test_nothing_changed(model):
    found = inputs(model)
    fingerprints.check(found, inputs(model), model)
    fingerprints.check({}, found, model)  # of a checkpoint that doesn't say
    assert set(inputs(model, adapter=False)) == {"data", "config"}  # the checkpoint has all the weights


@pytest.mark.parametrize("changed", [{"files": ["bad"]}, {"tokens": 8}])
def test_other_rows(model, changed):
    with pytest.raises(UserError, match=r"training rows of data.path changed since it was saved"):
        fingerprints.check(inputs(model), inputs(model, **changed), model)


def test_other_rows_of_validation(model):
    with pytest.raises(UserError, match=r"rows of data.validation_path changed since it was saved"):
        fingerprints.check(inputs(model, validation=["v1"]), inputs(model, validation=["v2"]), model)


def scaled(model):
    """As further training would leave them: every weight another one."""
    save_file({"a1": np.ones((400, 1000), np.float32), "b1": np.ones((400, 1000), np.float32)},
              model / "model-1.safetensors")  # fmt: skip


def renamed(model):
    path = model / "model-0.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"a0"', b'"c0"'))


def longer(model):
    save_file({"c": np.ones(4, np.float32)}, model / "model-2.safetensors")


@pytest.mark.parametrize("change", [scaled, renamed, longer, lambda model: (model / "model-1.safetensors").unlink()])
def test_other_weights(model, change):
    before = inputs(model)
    change(model)
    with pytest.raises(UserError, match=r"the weights of model.path, which the adapter was trained on, changed"):
        fingerprints.check(before, inputs(model), model)


def test_another_shape(model):
    before = inputs(model, adapter=False)
    (model / "config.json").write_text('{"rope_theta": 2}')
    with pytest.raises(UserError, match=r"config.json of model.path changed"):
        fingerprints.check(before, inputs(model, adapter=False), model)
