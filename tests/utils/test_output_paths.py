"""Places for results that can't be written: refused in one line, before any work, by every command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.utils import cache
from posttrain.utils.output_paths import check_directory, check_file

REFUSING = ("/proc", "/sys")  # to everybody, root too
MISSING = "/no/such/run"  # what there is to read is looked for after the place for the result


def command(module, *words, cwd):
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "POSTTRAIN_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=cwd, env=env, timeout=120
    )


@pytest.mark.parametrize("folder", REFUSING)
def test_a_file_system_that_refuses(folder):
    for path in (Path(folder), Path(folder, "x"), Path(folder, "x", "y")):
        with pytest.raises(UserError, match=rf"^a\.key={path}: nothing can be written in {folder} \(.+\); choose"):
            check_directory(path, "a.key")
    with pytest.raises(UserError, match=rf"a\.key={folder}/x`: nothing can be written in {folder} \(.+\); choose"):
        check_file(Path(folder, "x"), "a.key")


def test_a_file_or_a_link_to_nothing_in_the_way(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for path in (file, file / "x", file / "x" / "y"):
        with pytest.raises(UserError, match=rf"^a\.key={path}: {file} is not a directory; choose"):
            check_directory(path, "a.key")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for path in (link, link / "x"):
        with pytest.raises(UserError, match=rf"^a\.key={path}: {link} is a link to nothing; choose"):
            check_directory(path, "a.key")
    with pytest.raises(UserError, match=f"{file}/x`: there is no such folder"):
        check_file(file / "x", "a.key")
    with pytest.raises(UserError, match=f"{tmp_path}`: is a directory; name a file"):
        check_file(tmp_path, "a.key")
    assert file.read_text() == "kept"


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    before = sorted(tmp_path.iterdir())
    check_directory(tmp_path, "a.key")
    check_directory(tmp_path / "a" / "b", "a.key")
    check_file(file, "a.key")
    check_file(tmp_path / "new", "a.key")
    check_file(Path("/dev/null"), "a.key")
    assert sorted(tmp_path.iterdir()) == before
    assert file.read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match=rf"nothing can be written in {tmp_path} \(Permission denied\)"):
            check_directory(tmp_path / "x", "a.key")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    ("module", "words", "key"),
    [
        ("posttrain", ["hydra.run.dir={}"], "hydra.run.dir"),
        ("posttrain", ["--multirun", "seed=1,2", "hydra.sweep.dir={}"], "hydra.sweep.dir"),
        ("posttrain.preview", ["preview.out={}"], "preview.out"),
        ("posttrain.preview", ["preview.html={}"], "preview.html"),
        ("posttrain.evaluate", [MISSING, "data=demo", "evaluate.out={}"], "evaluate.out"),
        ("posttrain.convert", ["merge", MISSING, "{}"], "convert.out"),
        ("posttrain.convert", ["export", MISSING, "{}"], "convert.out"),
        ("posttrain.convert", ["import", MISSING, "{}"], "convert.out"),
    ],
)
def test_commands_name_the_key(module, words, key, tmp_path):
    place = f"{REFUSING[0]}/x"
    done = command(module, *(word.format(place) for word in words), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"{key}={place}" in done.stderr
    assert "nothing can be written in /proc" in done.stderr
    assert "Traceback" not in done.stderr and "trial" not in done.stderr
    assert not list(tmp_path.glob("[!c]*"))  # but the cache


def test_a_plan_of_a_run_makes_no_directory_for_it(tmp_path):
    """What a run is planned with is its own command line, so the run's directory is named there."""
    asked = ("model=llama3_8b", "plan.gpu=h100", "plan.read_data=false")
    for place in (tmp_path / "run", Path(REFUSING[0], "x")):
        done = command("posttrain.plan", *asked, f"hydra.run.dir={place}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_result_never_replaces_the_folder_that_the_command_runs_in(tmp_path):
    (tmp_path / "mine").write_text("kept")
    inner = tmp_path / "inner"
    inner.mkdir()
    for place in (".", "..", str(tmp_path)):
        done = command("posttrain.convert", "merge", MISSING, place, "convert.overwrite=true", cwd=inner)
        assert done.returncode == 2
        assert "this command runs in it" in done.stderr
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_cache_that_cannot_be_made():
    with pytest.raises(UserError, match=r"^/proc/x: .* can't be made in /proc \(.+\); .* cache_dir=DIR"):
        cache.make_private(Path("/proc/x/rows"))
