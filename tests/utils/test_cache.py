"""Directories of the cache: built once, whole or not at all."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.utils.cache import build_once, cache_root


def test_one_builder_among_many(tmp_path):
    built = []

    def build(out):
        built.append(out)
        time.sleep(0.05)
        (out / "whole").touch()

    with ThreadPoolExecutor(4) as pool:  # each opens the lock file itself, as processes do
        for path in pool.map(lambda _: build_once(tmp_path / "x", build), range(4)):
            assert (path / "whole").exists()
    assert len(built) == 1


def test_a_failed_build_leaves_nothing_and_a_killed_ones_scratch_is_removed(tmp_path):
    def fail(out):
        (out / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "x", fail)
    assert {path.name for path in tmp_path.iterdir()} == {".x.lock"}
    (tmp_path / ".x.tmpkilled").mkdir()
    build_once(tmp_path / "x", lambda out: (out / "whole").touch())
    assert {path.name for path in tmp_path.iterdir()} == {".x.lock", "x"}


def test_cache_root_order(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POSTTRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache/posttrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_root()) == "/xdg/posttrain"
    monkeypatch.setenv("POSTTRAIN_CACHE", "/own")
    assert str(cache_root()) == "/own"
    assert str(cache_root("/given")) == "/given"
