"""A run whose model is of a class of the user's own is read with that class's family."""

import sys

import pytest

from posttrain.errors import UserError
from posttrain.generate.load import import_family


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run, and the module that its model's class is in."""
    (tmp_path / "own_family.py").write_text("from posttrain.models import HFModel\n\n\nclass Own(HFModel):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    (folder / "hf").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {_target_: own_family.Own, path: ./x}\n")
    yield folder
    sys.modules.pop("own_family", None)


@pytest.mark.parametrize("part", [".", "hf"])
def test_its_module_is_imported(run, part, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_ALLOW_TARGETS", "own_family")
    import_family(run / part)
    assert "own_family" in sys.modules


def test_not_without_leave(run):
    with pytest.raises(UserError, match="POSTTRAIN_ALLOW_TARGETS"):
        import_family(run)
    assert "own_family" not in sys.modules


def test_of_anything_else_nothing_is(tmp_path):
    import_family(tmp_path)
    import_family(tmp_path / "no" / "such")
