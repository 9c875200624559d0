"""What the tests of kernels share."""

import pytest


@pytest.fixture(scope="module")
def torch():
    """Torch, with a GPU of its own."""
    import torch

    if not torch._C._cuda_getDeviceCount() or str(torch.cuda.current_device()) == "cpu":
        pytest.skip("no GPU, or this process is patched for a CPU: run these tests alone with -m gpu")
    torch.manual_seed(0)
    return torch
