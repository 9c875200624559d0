"""Soft-capped attention on a GPU: as near to fp32 as Transformers in bf16 is, in a CUDA graph, the same each time."""

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


def random_states(dtype: torch.dtype, width: int = 256) -> list[torch.Tensor]:
    """Queries [t, 8, d], keys and values [t, 4, d], large enough for the cap to matter; the same in every dtype."""
    torch.manual_seed(0)
    states = []
    for heads, size in ((8, 4.0), (4, 4.0), (4, 1.0)):
        tensor = size * torch.randn(TOTAL, heads, width, device="cuda")
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
@pytest.mark.parametrize("width", [256, 192, 128, 64])
def test_output_and_gradients(width, window, attention):
    layer = capped_layer(attention, width, window, SCALE)

    def reference(states):
        return theirs(states, LENGTHS, window, SCALE)

    expected = step(reference, random_states(torch.float32, width))
    noise = step(reference, random_states(torch.bfloat16, width))
    packed = row_of(ENDS, "cuda")
    found = step(lambda states: layer(*states, packed_seq_params=packed), random_states(torch.bfloat16, width))
    assert packed.posttrain_visible
    for name, ours, eager, right in zip(("output", "query", "key", "value"), found, noise, expected, strict=True):
        print(f"{name}: Transformers in bf16 {relative(eager, right):.4f}, here {relative(ours, right):.4f}")
        assert relative(ours, right) < 1.5 * relative(eager, right) + 1e-3, name


def test_in_fp32_it_is_the_definition(attention):
    layer = capped_layer(attention, 64, 200, SCALE)
    states = random_states(torch.float32, 64)
    expected = step(lambda states: theirs(states, LENGTHS, 200, SCALE), states)
    found = step(lambda states: layer(*states, packed_seq_params=row_of(ENDS, "cuda")), states)
    for ours, right in zip(found, expected, strict=True):
        assert relative(ours, right) < 1e-5


def test_the_same_each_time(attention):
    layer = capped_layer(attention, 256, None, SCALE)
    states = random_states(torch.bfloat16)
    first, again = (step(lambda states: layer(*states, packed_seq_params=row_of(ENDS, "cuda")), states) for _ in "ab")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


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
    """Those that blocks divide, and others."""
    layer = capped_layer(attention, 256, 200, SCALE)
    whole = [tensor.detach() for tensor in random_states(torch.bfloat16)]
    for total in (640, 777, 1024, 1100):
        states = [tensor[:total] for tensor in whole]
        found = layer(*states, packed_seq_params=row_of([0, 300, total], "cuda"))
        right = theirs([tensor.float() for tensor in states], [300, total - 300], 200, SCALE)
        assert relative(found, right) < 0.02
