"""Checkpoint directories: whole or absent, whatever ends the process; damage is found and named."""

import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from posttrain.checkpoint import directories, progress
from posttrain.checkpoint.progress import Progress
from posttrain.convert.checkpoints import with_step

# Everything by which Python changes a file system; a process is killed before each call of them in turn.
CALLS = {
    "open",
    "write",
    "close",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
    "chmod",
    "flush",
    "scandir",
}


def write(root: Path, step: int) -> None:
    """What Megatron leaves in .partial: here two shards and small files, their content telling the step."""
    partial = directories.directory(root / directories.PARTIAL, step)
    (partial / "sub").mkdir(parents=True)
    for name in ("__0_0.distcp", "__0_1.distcp", "sub/extra"):
        (partial / name).write_bytes(f"{name} of {step} ".encode() * 1000)
    (partial / "train_state.pt").write_bytes(f"step {step}".encode())


def save(root: Path, step: int, keep: int | None = None) -> Path:
    write(root, step)
    return finish(root, step, keep)


def finish(root: Path, step: int, keep: int | None, checked: set[Path] | None = None) -> Path:
    """As the manager does: publish, then remove old ones."""
    written = directories.finish(root, step)
    if keep is not None:
        directories.prune(written, keep, checked or set())
    return written


def child(action) -> int:
    """Run `action` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except OSError:
            os._exit(2)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(9)
    return os.waitpid(pid, 0)[1]


def killed_at(point: int, action):
    """`action` in a process that kills itself before its `point`-th call of CALLS."""

    def run():
        left = point

        def watch(frame, event, function):
            nonlocal left
            if event == "c_call" and getattr(function, "__name__", "") in CALLS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(watch)
        action()

    return run


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: flushing hundreds of times to a disk takes minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


NIGHTLY_SAVES = [
    pytest.param(*case, marks=pytest.mark.nightly) for case in ((None, False), (1, False), (2, False), (2, True))
]


@pytest.mark.parametrize(("keep", "damaged"), [(1, True), *NIGHTLY_SAVES])
def test_kill_at_every_call_of_a_save(memory, keep, damaged, record_property):
    """SIGKILL before every call that touches the disk: the last save or this one is there, whole; then a save works."""
    points = 0
    while True:
        points += 1
        root = memory / str(points)
        for step in (2, 4):
            save(root, step)
        if damaged:  # the step was saved before, and a disk changed it
            (save(root, 6) / "__0_0.distcp").write_bytes(b"?")

        def write_and_finish(root=root):
            write(root, 6)
            finish(root, 6, keep)

        status = child(killed_at(points, write_and_finish))
        found, skipped = directories.newest(root, hashes=True)
        assert found in (directories.directory(root, 4), directories.directory(root, 6)), points
        assert (found / "train_state.pt").read_bytes() == f"step {directories.step_of(found)}".encode()
        assert damaged or not skipped
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0 and directories.step_of(found) == 6
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        directories.clean(root)
        assert directories.newest(root, hashes=True)[0] == found
        assert directories.step_of(save(root, 8, keep)) == 8
        assert directories.newest(root, hashes=True)[0] == directories.directory(root, 8)
        assert not list(root.glob(".*"))
    record_property("kill_points", points - 1)
    print(f"{points - 1} kill points, all recovered")
    assert points > 40


DAMAGE = {
    "a truncated shard": lambda c: os.truncate(c / "__0_0.distcp", 100),
    "a flipped bit": lambda c: flip(c / "__0_1.distcp"),
    "a missing shard": lambda c: (c / "__0_0.distcp").unlink(),
    "a missing file below": lambda c: (c / "sub" / "extra").unlink(),
    "no seal": lambda c: (c / directories.SEAL).unlink(),
    "an empty seal": lambda c: (c / directories.SEAL).write_text(""),
    "a seal of nothing": lambda c: (c / directories.SEAL).write_text('{"files": {}}'),
    "a seal of another kind": lambda c: (c / directories.SEAL).write_text("[1, 2]"),
    "a seal cut short": lambda c: os.truncate(c / directories.SEAL, 50),
    "a seal that points outside": lambda c: (c / directories.SEAL).write_text(
        '{"files": {"../../x": {"size": 1, "sha256": "0"}}}'
    ),
    "a file that became longer": lambda c: (c / "train_state.pt").write_bytes(b"step 4 and more"),
    "an empty directory": lambda c: [path.unlink() for path in c.rglob("*") if path.is_file()],
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, what):
    older, newer = save(tmp_path, 2), save(tmp_path, 4)
    assert directories.newest(tmp_path, hashes=True) == (newer, [])
    DAMAGE[what](newer)
    found, skipped = directories.newest(tmp_path, hashes=True)
    assert found == older
    assert len(skipped) == 1 and skipped[0].startswith(f"{newer}: ")
    # Without reading every byte all but a change of content is found.
    assert (directories.problem(newer) is None) == (what == "a flipped bit")


def test_nothing_is_left(tmp_path):
    only = save(tmp_path, 2)
    (only / "__0_0.distcp").unlink()
    assert directories.newest(tmp_path) == (None, [f"{only}: __0_0.distcp is missing"])
    assert directories.newest(tmp_path / "none") == (None, [])


def test_damaged_ones_do_not_count_among_those_kept(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (directories.directory(tmp_path, 6) / "train_state.pt").unlink()
    save(tmp_path, 8, keep=2)
    assert [directories.step_of(path) for path in directories.checkpoints(tmp_path)] == [8, 6, 4]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_just_written_is_kept_whatever_the_newest_has_become(tmp_path, what, keep):
    """The newest is damaged and the run resumes from the one before: what is written then counts."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    DAMAGE[what](directories.directory(tmp_path, 6))
    found, _ = directories.newest(tmp_path, hashes=True)
    save(tmp_path, directories.step_of(found) + 1, keep)
    steps = [directories.step_of(path) for path in directories.checkpoints(tmp_path)]
    assert steps == [6, 5, 4, 2][: keep + 1]
    assert directories.newest(tmp_path, hashes=True)[0] == directories.directory(tmp_path, 5)


@pytest.mark.parametrize("what", DAMAGE)
def test_an_older_one_that_fails_its_hashes_is_named_and_does_not_count(tmp_path, what):
    for step in (2, 4, 6):
        save(tmp_path, step)
    DAMAGE[what](directories.directory(tmp_path, 6))
    written, checked = save(tmp_path, 8), set()
    (damaged,) = directories.prune(written, 2, checked)
    assert damaged.startswith(f"{directories.directory(tmp_path, 6)}: ")
    assert [directories.step_of(path) for path in directories.checkpoints(tmp_path)] == [8, 6, 4]
    assert checked == {directories.directory(tmp_path, step) for step in (8, 4)}


def test_temporary_ones_last_until_the_next(tmp_path):
    """The best and what was asked for by the step stay; with a limit the newest count, all alike."""
    losses = {2: 0.9, 4: 0.3, 6: 0.5, 8: None, 10: None}
    for step, loss in losses.items():
        write(tmp_path, step)
        temporary = step not in (6, 10)
        Progress(val_loss=loss, temporary=temporary).write(directories.directory(tmp_path / directories.PARTIAL, step))
        written = directories.finish(tmp_path, step)
        directories.prune(written, None, set(), progress.best(tmp_path), progress.is_temporary)
    assert [directories.step_of(path) for path in directories.checkpoints(tmp_path)] == [10, 6, 4]
    directories.prune(written, 2, set(), None, progress.is_temporary)
    assert [directories.step_of(path) for path in directories.checkpoints(tmp_path)] == [10, 6]


def test_the_best_is_kept_besides_the_newest(tmp_path):
    for step, loss in ((2, 0.9), (4, 0.3), (6, 0.3), (8, None)):
        write(tmp_path, step)
        Progress(val_loss=loss).write(directories.directory(tmp_path / directories.PARTIAL, step))
        written = directories.finish(tmp_path, step)
        directories.prune(written, 1, set(), progress.best(tmp_path))
    assert [directories.step_of(path) for path in directories.checkpoints(tmp_path)] == [8, 4]
    newest, best = (directories.directory(tmp_path, step) for step in (8, 4))
    assert progress.best(tmp_path) == best
    assert with_step(newest, tmp_path) == f"{newest} (step 8, the newest; step 4 has the lowest validation loss)"
    assert with_step(best, best) == f"{best} (step 4)"
    (directories.directory(tmp_path, 4) / "__0_0.distcp").unlink()
    assert progress.best(tmp_path) is None


def test_a_disk_that_refuses(tmp_path):
    """A write beyond the file size limit fails as on a full disk; the checkpoint before stays."""
    older = save(tmp_path, 2)

    def limited():
        write(tmp_path, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # the seal is longer
        directories.finish(tmp_path, 4)

    assert os.WEXITSTATUS(child(limited)) == 2
    assert directories.newest(tmp_path, hashes=True) == (older, [])


def test_a_directory_that_may_not_be_written(tmp_path):
    older = save(tmp_path, 2)
    write(tmp_path, 4)

    def as_nobody():
        os.chmod(tmp_path, 0o555)
        if os.geteuid() == 0:
            os.setuid(65534)
        directories.finish(tmp_path, 4)

    try:
        assert os.WEXITSTATUS(child(as_nobody)) == 2
    finally:
        os.chmod(tmp_path, 0o755)
    assert directories.newest(tmp_path, hashes=True) == (older, [])
