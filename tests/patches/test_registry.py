"""The set of patches is what each platform needs, and no more; outside their tested versions nothing is silent."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import patches
from posttrain.errors import UserError
from posttrain.patches import Kind, Platform, registry, runner
from posttrain.patches.elsewhere import CHANGES

STARTUP = {"imports", "no-dynamo", "transformers-imports", "compile-helpers", "results-queue", "packed-rope"}
CORRECTNESS = {"async-writer", "base-weights", "missing-weights", "fsdp-parameter-names", "fsdp-empty-shards"}
CORRECTNESS |= {"optimizer-of-experts"}
CPU = {"cpu-cuda-queries", "cpu-placement", "cpu-rng", "cpu-expert-splits", "cpu-megatron-fsdp"}


def wanted(device: str, transformer_engine: bool) -> set[str]:
    """Names of the patches that a platform gets."""
    platform = Platform(device, transformer_engine)
    return {item.name for item in runner.registered() if item.wanted(platform)}


@pytest.fixture
def newer(monkeypatch):
    """Megatron-Bridge 0.7 and Megatron-Core 0.20 instead of the installed ones."""
    versions = {"megatron-bridge": "0.7.0", "megatron-core": "0.20.0"}
    real = registry.installed_version
    monkeypatch.setattr(registry, "installed_version", lambda name: versions.get(name) or real(name))
    monkeypatch.delenv(patches.UNTESTED, raising=False)
    return monkeypatch


def test_gpu_with_transformer_engine_gets_only_what_every_machine_needs():
    assert wanted("cuda", True) == STARTUP | CORRECTNESS | {"jit-warmup"}


def test_cpu_patches_stay_on_cpus():
    assert wanted("cpu", False) == STARTUP | CORRECTNESS | CPU | {"torch-distributed-optimizer"}
    assert not wanted("cuda", False) & CPU


def test_imports_come_first():
    assert runner.registered()[0].name == "imports"


def test_each_says_what_happens_without_it():
    for change in (*runner.registered(), *CHANGES):
        assert len(change.symptom) > 20 and change.versions
    for item in runner.registered():
        assert item.apply.__doc__


def test_kind_is_the_folder():
    for item in runner.registered():
        assert item.apply.__module__.startswith(f"posttrain.patches.{item.kind}.")


def test_names_are_unique():
    names = [change.name for change in (*runner.registered(), *CHANGES)]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="two patches"):
        patches.patch("imports", kind=Kind.STARTUP, symptom="", versions={})(lambda: None)


def test_a_package_that_is_missing_is_untested():
    change = registry.Change("x", Kind.CPU, "y", {"no-such-package": ">=1"}, registry.everywhere)
    assert change.untested() == ["no-such-package is not installed (tested: >=1)"]


@pytest.mark.parametrize("version", ["0.19.0", "0.19.2+local", "0.19.9rc1"])
def test_versions_within_the_range(monkeypatch, version):
    monkeypatch.setattr(registry, "installed_version", lambda name: version)
    change = registry.Change("x", Kind.CPU, "y", {"megatron-core": ">=0.19,<0.20"}, registry.everywhere)
    assert not change.untested()


def test_untested_correctness_stops_a_run(newer):
    with pytest.raises(UserError) as error:
        patches.check(Platform("cuda", True))
    message = str(error.value)
    for part in (
        "async-writer",
        "megatron-core 0.20.0 (tested: >=0.19,<0.20)",
        "megatron-bridge 0.7.0",
        "make setup",
        f"{patches.UNTESTED}=1",
    ):
        assert part in message
    assert "results-queue" not in message  # saves time: a run does without
    with pytest.raises(UserError, match="async-writer"):
        patches.apply(Platform("cuda", True))


def test_the_switch_is_an_environment_variable(newer):
    newer.setenv(patches.UNTESTED, "1")
    untested = {change.name for change in patches.check(Platform("cpu", False))}
    assert {"imports", "packed-rope", "cpu-rng", "bridges"} <= untested and "no-dynamo" not in untested


def of_test(kind: Kind, done: list[str], error: Exception | None = None) -> patches.Patch:
    """A patch of Megatron-Core 0.19 that notes that it was applied, or raises."""

    def apply() -> None:
        if error:
            raise error
        done.append("applied")

    return patches.Patch("of-test", kind, "a symptom", {"megatron-core": ">=0.19,<0.20"}, registry.everywhere, apply)


@pytest.fixture
def alone(newer, monkeypatch):
    """Make a patch the only change there is; nothing has been applied."""

    def make(item: patches.Patch) -> None:
        monkeypatch.setattr(runner, "registered", lambda: [item])
        monkeypatch.setattr(runner, "CHANGES", ())
        monkeypatch.setattr(runner, "_applied", [])
        monkeypatch.setattr(runner, "_skipped", [])

    return make


@pytest.mark.parametrize("kind", [Kind.STARTUP, Kind.CPU])
def test_other_kinds_are_skipped_and_said(alone, caplog, kind):
    done = []
    alone(of_test(kind, done))
    assert patches.apply(Platform("cpu", False)) == [] and not done
    assert "patch of-test is skipped: megatron-core 0.20.0 (tested: >=0.19,<0.20)" in caplog.text


@pytest.mark.parametrize("kind", list(Kind))
def test_with_the_switch_all_kinds_are_applied_and_said(alone, newer, caplog, kind):
    done = []
    alone(of_test(kind, done))
    newer.setenv(patches.UNTESTED, "1")
    assert patches.apply(Platform("cpu", False)) == ["of-test"] and done
    assert (
        f"patch of-test is applied to megatron-core 0.20.0 (tested: >=0.19,<0.20), because of {patches.UNTESTED}"
        in (caplog.text)
    )


def test_a_patch_that_does_not_fit_is_named(alone, newer):
    alone(of_test(Kind.CORRECTNESS, [], AttributeError("no attribute 'gone'")))
    newer.setenv(patches.UNTESTED, "1")
    with pytest.raises(UserError, match=r"of-test does not fit megatron-core 0\.20\.0.*'gone'"):
        patches.apply(Platform("cpu", False))


@pytest.fixture(scope="module")
def newer_on_path(tmp_path_factory) -> Path:
    """A folder in front of the path in which Megatron-Core 0.20 is installed, as far as metadata tell."""
    folder = tmp_path_factory.mktemp("newer")
    info = folder / "megatron_core-0.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.20.0\n")
    return folder


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m WORDS` with `folder` in front of the path."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name != patches.UNTESTED}
    env = kept | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=env, cwd=folder)


def test_a_run_on_untested_versions_stops_before_it_starts(newer_on_path):
    done = command(newer_on_path, "posttrain")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "async-writer" in done.stderr and "megatron-core 0.20.0" in done.stderr
    assert not (newer_on_path / "outputs").exists()


def test_no_configuration_sets_the_switch(newer_on_path):
    done = command(newer_on_path, "posttrain", f"+hydra.job.env_set.{patches.UNTESTED}='1'")
    assert done.returncode == 2 and "untested versions" in done.stderr


def test_the_doctor_lists_what_is_untested(newer_on_path):
    done = command(newer_on_path, "posttrain.doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert found["patch async-writer"]["state"] == "bad" and "0.20.0" in found["patch async-writer"]["text"]
    assert found["patch cpu-rng"]["state"] == "note" and "skipped" in found["patch cpu-rng"]["advice"]
    done = command(newer_on_path, "posttrain.doctor", "--json", **{patches.UNTESTED: "1"})
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0 and found["patch async-writer"]["state"] == "note"
    assert "async-writer" in found["patches"]["text"]


def test_changes_elsewhere_name_their_module():
    for change in CHANGES:
        assert importlib.util.find_spec(change.module), change.name
