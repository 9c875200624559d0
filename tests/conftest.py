"""Fixtures for every test."""

import contextlib
import os
from pathlib import Path

import pytest

from posttrain.utils.gpus import visible_gpus

with contextlib.suppress(ImportError):  # GPU machines may lack it, and the GPU tests don't use it
    from hypothesis import settings

    # The same examples every time, so that a run tells of the change alone; HYPOTHESIS_PROFILE=default explores.
    settings.register_profile("fixed", derandomize=True, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

if not visible_gpus():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as the launcher does, for tests that train in their own process

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Leave nightly tests to `make test-all`; the longest files first, so that no worker is left with one."""
    if not os.environ.get("POSTTRAIN_TEST_ALL"):
        skip = pytest.mark.skip(reason="takes longer than CI has: make test-all")
        for item in items:
            kept = item.get_closest_marker("every_run") or item.get_closest_marker("gpu")
            if item.get_closest_marker("nightly") and not kept:
                item.add_marker(skip)
    items.sort(key=lambda item: "e2e" not in item.path.parts and item.path.name != "test_training.py")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional shared test data (POSTTRAIN_SHARED, else ../shared); without it the test is skipped."""
    folder = Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"optional shared test data: no folder {folder} (set POSTTRAIN_SHARED)")
    return folder


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory) -> Path:
    """A cache for what starts from the demo model: the first test converts it, for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder / "demo-cache"  # POSTTRAIN_CACHE; two that build the same wait for each other


@pytest.fixture(scope="module")
def selected(request) -> list[dict]:
    """The parameters of the tests of this module that are going to run, of which one process does all the work."""
    chosen = []
    for item in request.session.items:
        if item.module is request.module and hasattr(item, "callspec") and not item.get_closest_marker("skip"):
            chosen.append(item.callspec.params)
    return chosen


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """Megatron on this process's GPU."""
    import torch

    from posttrain import patches

    # Not torch.cuda: the patches for a CPU, if they are applied in this process, answer it.
    if not torch._C._cuda_getDeviceCount() or "cpu-placement" in patches.applied():
        pytest.skip("no GPU, or this process is patched for a CPU: run these tests alone with -m gpu")
    patches.apply(patches.Platform.detect("cuda"))
    from megatron.core import parallel_state, tensor_parallel

    store = tmp_path_factory.mktemp("store") / "file"
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
