"""Where wandb sends a run, with the real library: what a working directory says about it is not honoured."""

import os
import subprocess
import sys

import pytest

from posttrain.errors import UserError
from posttrain.train.trackers import TrackedRun, Wandb

wandb = pytest.importorskip("wandb")

START = """
import pathlib
from posttrain.train.trackers import TrackedRun, Wandb
pathlib.Path("run").mkdir()
tracker = Wandb(mode="offline")
tracker.start(TrackedRun(pathlib.Path("run"), "name", {}))
tracker.finish({})
print("sent:", tracker.run.settings.base_url)
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Write settings into a folder of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)

    def write(line, folder="wandb"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings").write_text(f"[default]\n{line}\n")

    return write


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_an_address_in_the_working_directory(folder, settings, tmp_path):
    settings("base_url = https://elsewhere.example", folder)
    honoured = wandb.Settings()
    honoured.update_from_system_settings()
    assert str(honoured.base_url) == "https://elsewhere.example"  # by wandb itself: this is why
    with pytest.raises(UserError, match=rf"{folder}/settings: sets base_url"):
        Wandb(mode="offline").start(TrackedRun(tmp_path, "name", {}))


@pytest.mark.parametrize("key", ["entity", "http_proxy", "insecure_disable_ssl", "api_key"])
def test_nor_to_whom_or_through_what(key, settings, tmp_path):
    settings(f"{key} = x")
    with pytest.raises(UserError, match=f"sets {key}"):
        Wandb(mode="offline").start(TrackedRun(tmp_path, "name", {}))


def test_the_environment_and_ones_own_settings_may(settings, tmp_path):
    settings("project = p\nbase_url = https://api.wandb.ai")
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_SILENT": "true", "WANDB_BASE_URL": "https://ours.example"}
    done = subprocess.run([sys.executable, "-c", START], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "sent: https://ours.example" in done.stdout, done.stderr
