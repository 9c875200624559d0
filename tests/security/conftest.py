"""A payload that leaves a file behind if anything runs it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))  # the small tokenizer

PAYLOAD = """
import os, pathlib
def fire(*args, **kwargs):
    pathlib.Path(os.environ["CANARY"]).write_text("executed")
    return {}
class Fire:
    def __init__(self, *args, **kwargs):
        fire()
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A path that must not exist at the end, and the modules `payload`, `imported` (fires on import) to name."""
    modules = tmp_path / "modules"
    (modules / "imported").mkdir(parents=True)
    (modules / "payload.py").write_text(PAYLOAD)
    (modules / "imported" / "__init__.py").write_text(PAYLOAD + "fire()\n")
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    for name in ("payload", "imported"):
        sys.modules.pop(name, None)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "the payload was executed"
