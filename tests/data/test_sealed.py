"""The cached data behind a run: what a disk has changed is found, said and made again."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from test_sft import build, pairs, write

from posttrain.data import packing, sealed
from posttrain.errors import UserError
from posttrain.utils import cache


def ids(splits):
    return [splits.train[index]["input_ids"].tolist() for index in range(len(splits.train))]


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flipped ids": ("rows-*/rows.arrow", lambda path: flip(path, 0.3)),
    "a flipped footer": ("rows-*/rows.arrow", lambda path: flip(path, 0.97)),
    "flipped counts": ("rows-*/counts.json", lambda path: flip(path, 0.9)),
    "cut rows": ("rows-*/rows.arrow", lambda path: os.truncate(path, 100)),
    "no rows": ("rows-*/rows.arrow", Path.unlink),
    "no seal": (f"rows-*/{sealed.SEAL}", Path.unlink),
    "a seal of nothing": (f"packed-*/{sealed.SEAL}", lambda path: path.write_text("{}")),
    "a seal of another kind": (f"packed-*/{sealed.SEAL}", lambda path: path.write_text("[1]")),
    "a wild index": ("packed-*/order.npy", lambda path: np.save(path, np.load(path) + 10**6)),
    "sequences that overlap": ("packed-*/starts.npy", lambda path: np.save(path, np.load(path)[::-1].copy())),
    "another order": ("packed-*/order.npy", lambda path: np.save(path, np.load(path)[::-1].copy())),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_said_and_made_again(what, tokenizer, tmp_path, caplog):
    data = {"path": write(tmp_path / "a.jsonl", pairs(40))}
    before = ids(build(tokenizer, tmp_path, **data))
    pattern, damage = DAMAGE[what]
    (path,) = tmp_path.rglob(pattern)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert ids(build(tokenizer, tmp_path, **data)) == before
    assert "is damaged" in caplog.text and path.parent.name in caplog.text
    caplog.clear()
    assert ids(build(tokenizer, tmp_path, **data)) == before and "damaged" not in caplog.text


def test_a_run_checks_beside_its_start(tokenizer, tmp_path):
    """What was changed is opened, found before the first step, and made again by the next start; see callbacks.py."""
    data = {"path": write(tmp_path / "a.jsonl", pairs(40))}
    before = ids(build(tokenizer, tmp_path, **data))
    (path,) = tmp_path.rglob("rows.arrow")
    flip(path, 0.3)
    first, other = sealed.Used(), sealed.Used(verify=False)
    for used in (first, other):
        build(tokenizer, tmp_path, used=used, **data)
    assert not other.threads and first.remove_damaged() and not path.exists()
    build(tokenizer, tmp_path, used=(again := sealed.Used()), **data)
    assert other.remove_damaged()  # this process still has the rows that were removed
    assert not again.remove_damaged() and ids(build(tokenizer, tmp_path, **data)) == before


def test_what_was_made_again_meanwhile_is_not_removed(tmp_path):
    folder = tmp_path / "x"
    cache.build_once(folder, lambda out: (out / "new").touch())
    cache.discard(folder, folder.stat().st_ino + 1)
    assert (folder / "new").exists()
    cache.discard(folder, folder.stat().st_ino)
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


@pytest.mark.parametrize("mode", [0o777, 0o775])
@pytest.mark.parametrize("level", ["", "data", "models/x"])
def test_a_cache_that_others_may_write_to_is_refused(level, mode, tmp_path):
    target = tmp_path / "root" / (level or "data").partition("/")[0] / "x"
    target.mkdir(parents=True)
    folder = tmp_path / "root" / level
    folder.chmod(mode)
    with pytest.raises(UserError, match=r"others may write to it.*POSTTRAIN_CACHE"):
        cache.build_once(target, lambda out: None)
    folder.chmod(mode | 0o1000)  # as /tmp is: what lies there is its owner's
    cache.build_once(target, lambda out: None)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_cache_of_another_user_is_refused(tmp_path):
    (tmp_path / "root" / "data").mkdir(parents=True)
    os.chown(tmp_path / "root" / "data", 65534, 65534)
    with pytest.raises(UserError, match="belongs to the user with the id 65534"):
        cache.build_once(tmp_path / "root" / "data" / "x", lambda out: None)


def test_a_new_cache_is_private(tmp_path):
    before = os.umask(0)
    try:
        cache.build_once(tmp_path / "a" / "root" / "data" / "x", lambda out: None)
    finally:
        os.umask(before)
    for folder in ("a", "a/root", "a/root/data"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


def test_bins_that_fit():
    order, starts = packing.pack(np.array([3, 5, 2]), 8, 0)
    assert packing.fits(order, starts, 3) and not packing.fits(order, starts, 2)
    assert not packing.fits(order - 1, starts, 3) and not packing.fits(order, starts[:-1], 3)
    assert not packing.fits(order, np.array([], np.int64), 3)
