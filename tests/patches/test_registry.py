"""The set of patches is what each platform needs, and no more."""

import pytest

from posttrain import patches
from posttrain.patches import Platform


def wanted(device, transformer_engine):
    """Names of the patches that a platform gets."""
    from posttrain.patches import catalogue  # noqa: F401

    platform = Platform(device, transformer_engine)
    return [patch.name for patch in patches.REGISTRY.values() if patch.wanted(platform)]


EVERYWHERE = [
    "imports", "compile-helpers", "results-queue", "random-base-weights", "canonical-lora-parts", "dora-bias",
    "dora-norm", "packed-rope", "jit-warmup", "no-dynamo", "transformers-imports", "async-writer",
]  # fmt: skip


def test_gpu_with_transformer_engine_gets_only_what_every_machine_needs():
    assert set(wanted("cuda", True)) == set(EVERYWHERE)


def test_cpu_patches_stay_on_cpus():
    names = set(wanted("cpu", False))
    assert {name for name in names if name.startswith("cpu-")}
    assert not {name for name in wanted("cuda", False) if name.startswith("cpu-")}


def test_imports_come_first():
    assert wanted("cpu", False)[0] == "imports"


def test_each_says_what_happens_without_it():
    wanted("cpu", False)
    for patch in patches.REGISTRY.values():
        assert len(patch.symptom) > 20 and patch.versions and patch.apply.__doc__


def test_versions_out_of_range_are_left_alone():
    patch = patches.Patch("x", "y", {"torch": "<1"}, lambda platform: True, lambda: None)
    assert not patch.wanted(Platform("cpu", False))


def test_names_are_unique():
    wanted("cpu", False)
    with pytest.raises(ValueError, match="two patches"):
        patches.patch("imports", "", {})(lambda: None)
