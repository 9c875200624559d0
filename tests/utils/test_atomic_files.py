"""Files that are old or new, never half."""

import json
import os

import pytest

from posttrain.errors import location_error
from posttrain.utils import atomic_files


def test_json_of_numbers_that_json_lacks(tmp_path):
    atomic_files.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5], "z": "é"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5], "z": "é"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.write_text("old")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_files.write_text(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_said_with_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refused:
        atomic_files.write_text(tmp_path / "a", "x")
    assert location_error(refused.value) == f"{tmp_path / 'a'}: No space left on device" and not list(
        tmp_path.iterdir()
    )
