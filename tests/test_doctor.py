"""What the doctor finds."""

import json
import subprocess
import sys

import pytest

from posttrain import doctor
from posttrain.utils.gpus import find_gpu


def test_this_machine_can_run():
    done = subprocess.run([sys.executable, "-m", "posttrain.doctor", "--json"], capture_output=True, text=True)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0
    assert found["Python"]["state"] == "ok" and found["torch"]["text"].startswith("2.11.0")
    assert "imports" in found["patches"]["text"]


def test_a_missing_package_is_bad(monkeypatch):
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.0")
    found = {finding.name: finding for finding in doctor.check_packages()}
    assert found["no-such-package"].state == "bad" and "1.0" in found["no-such-package"].advice


def test_another_version_is_a_note(monkeypatch):
    monkeypatch.setitem(doctor.TESTED, "torch", "1.0")
    assert {finding.name: finding.state for finding in doctor.check_packages()}["torch"] == "note"


def test_no_room_is_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "REQUIRED_DISK_GIB", 1e9)
    assert doctor.check_disk("disk", tmp_path / "outputs").state == "note"


@pytest.mark.parametrize("name", ["sbatch"])
def test_no_slurm_is_a_note(monkeypatch, name):
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.check_slurm().state == "note"


@pytest.mark.parametrize(
    ("gpu", "state", "text"),
    [
        ("a100", "note", "none"),
        ("l40s", "note", "of dense layers, not of experts"),
        ("h100", "ok", "precision=fp8"),
        ("b200", "ok", "precision=fp8"),
    ],
)
def test_whether_a_gpu_has_products_in_8_bits(gpu, state, text):
    finding = doctor.check_eight_bit(find_gpu(gpu))
    assert (finding.state, finding.text) == (state, text)
    assert ("use precision=bf16" in finding.advice) == (state == "note")
