"""Soft-capped attention on a GPU: as near to fp32 as Transformers in bf16 is, and in a CUDA graph."""

from types import SimpleNamespace

import pytest
import torch
from gemma2_attention import capped_layer, row_of, theirs

pytestmark = pytest.mark.gpu
SCALE = 256**-0.5
TOTAL = 1100  # no multiple of a block
ENDS = [0, 3, 130, 131, 900, 1000, 1000, 1000]
LENGTHS = [3, 127, 1, 769, 100, 100]


@pytest.fixture(scope="module")
def attention():
    """The module of the layer, on this process's GPU."""
    from posttrain import patches

    # Not torch.cuda: the patches for a CPU, if they are applied in this process, answer it.
    if not torch._C._cuda_getDeviceCount() or "cpu-placement" in patches.applied():
        pytest.skip("no GPU, or this process is patched for a CPU: run these tests alone with -m gpu")
    patches.apply(patches.Platform.detect("cuda"))
    from posttrain.ops import attention

    return attention


def random_states(dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries [t, 8, 256], keys and values [t, 4, 256], large enough for the cap to matter; the same in every dtype."""
    torch.manual_seed(0)
    states = []
    for heads, size in ((8, 4.0), (4, 4.0), (4, 1.0)):
        tensor = size * torch.randn(TOTAL, heads, 256, device="cuda")
        states.append(tensor.bfloat16().to(dtype).requires_grad_())
    return states


def step(attend, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, and gradients for a fixed upstream one."""
    out = attend(states)
    upstream = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [out.detach(), *torch.autograd.grad(out, states, upstream.to(out.dtype))]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square of the difference, over that of what is expected."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("window", [None, 200])
def test_output_and_gradients(window, attention):
    layer = capped_layer(attention, 256, window, SCALE)

    def reference(states):
        return theirs(states, LENGTHS, window, SCALE)

    expected = step(reference, random_states(torch.float32))
    noise = step(reference, random_states(torch.bfloat16))
    packed = row_of(ENDS, "cuda")
    found = step(lambda states: layer(*states, packed_seq_params=packed), random_states(torch.bfloat16))
    assert packed.posttrain_masks
    for name, ours, eager, right in zip(("output", "query", "key", "value"), found, noise, expected, strict=True):
        print(f"{name}: Transformers in bf16 {relative(eager, right):.4f}, here {relative(ours, right):.4f}")
        assert relative(ours, right) < 1.5 * relative(eager, right) + 1e-3, name


def test_later_processes_find_what_is_compiled(attention, tmp_path, monkeypatch):
    """What is traced is of operations that torch's cache knows."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = capped_layer(attention, 256, None, SCALE)
    for found in ("autograd_cache_miss", "autograd_cache_hit"):  # as in a process after the first one
        torch._dynamo.reset()
        counters.clear()
        step(lambda states: layer(*states, packed_seq_params=row_of(ENDS, "cuda")), random_states(torch.bfloat16))
        assert counters["aot_autograd"][found] == 1
        assert not counters["aot_autograd"]["autograd_cache_bypass"]


def test_captured_step_follows_the_boundaries(attention):
    """Replayed with other boundaries in the same place, it does what the plain step does with these."""
    layers = [capped_layer(attention, 256, window, SCALE) for window in (None, 200)]
    states = random_states(torch.bfloat16)
    ends = torch.tensor(ENDS, dtype=torch.int32, device="cuda")

    def both_layers():
        packed = SimpleNamespace(cu_seqlens_q=ends)
        out = sum(layer(*states, packed_seq_params=packed) for layer in layers)
        return [out, *torch.autograd.grad(out.float().square().sum(), states)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_layers()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_layers()
    for boundaries in ([0, 500, 1100, 1100, 1100, 1100, 1100, 1100], [0, 128, 256, 257, 700, 701, 1099, 1099]):
        ends.copy_(torch.tensor(boundaries, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, both_layers(), strict=True):
            assert relative(found, expected.float()) < 1e-3


def test_rows_of_any_length(attention):
    """Rows that are not packed: kernels of one length, then of any."""
    layer = capped_layer(attention, 256, 200, SCALE)
    whole = [tensor.detach() for tensor in random_states(torch.bfloat16)]
    for total in (640, 777, 1024, 1100):
        states = [tensor[:total] for tensor in whole]
        found = layer(*states, packed_seq_params=row_of([0, 300, total], "cuda"))
        right = theirs([tensor.float() for tensor in states], [300, total - 300], 200, SCALE)
        assert relative(found, right) < 0.02
