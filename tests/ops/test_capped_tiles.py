"""Tiles of the soft-capped attention's kernels, compiled without a GPU: they fit the shared memory of each."""

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from posttrain.ops import capped_kernels
from posttrain.ops.capped_attention import is_possible
from posttrain.ops.capped_kernels import NARROW_HEADS, WIDE_HEADS, Choice, small_tiles
from posttrain.ops.capped_limits import WIDEST_HEAD

pytestmark = pytest.mark.nightly
# The most of a program, KB (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED = {86: 99, 90: 227}
NUMBERS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
TENSORS = {"query", "key", "value", "upstream", "out", "gradient", "key_gradient", "value_gradient"}
TYPES = {"first": "*i32", "last": "*i32", "logs": "*fp32", "products": "*fp32", "squash": "fp32", "height": "fp32"}
TYPES["scale"] = "fp32"


def small(dtype: torch.dtype) -> Choice:
    tiles = small_tiles(dtype.itemsize)
    return Choice(tiles, tiles, tiles, tiles)


CASES = [
    pytest.param(86, torch.bfloat16, WIDEST_HEAD, small(torch.bfloat16), marks=pytest.mark.every_run),
    (86, torch.float32, WIDEST_HEAD, small(torch.float32)),
    (90, torch.bfloat16, WIDEST_HEAD, WIDE_HEADS),
    (90, torch.bfloat16, 128, NARROW_HEADS),
]


def shared_memory(kernel, dtype: torch.dtype, width: int, tiles, capability: int, **constants) -> int:
    """Bytes of a program of a kernel."""
    options = capped_kernels._options(torch.empty(0, width, dtype=dtype), tiles)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants |= options | {"APPROXIMATE": dtype == torch.bfloat16}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPES.get(name, "i32")
        if name in TENSORS:
            signature[name] = f"*{NUMBERS[dtype]}"
        if name in TENSORS or name == "width":
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch).metadata.shared


@pytest.mark.every_run
@pytest.mark.parametrize(("width", "cap", "possible"), [(256, 50.0, True), (257, 50.0, False), (256, 65.0, False)])
def test_wider_heads_and_higher_caps_are_written_out(width, cap, possible):
    query = FakeTensor(
        FakeTensorMode(), torch.empty(8, 2, width, device="meta", dtype=torch.bfloat16), torch.device("cuda")
    )
    assert is_possible(query, cap) is possible


@pytest.mark.parametrize(("capability", "dtype", "width", "choice"), CASES)
def test_they_fit_the_shared_memory(capability, dtype, width, choice, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [
        (capped_kernels._forward, choice.forward, {}),
        (capped_kernels._backward_queries, choice.queries, {}),
    ]
    for keys, values, tiles in capped_kernels._kernels(choice):
        kernels.append((capped_kernels._backward_keys_values, tiles, {"KEYS": keys, "VALUES": values}))
    for kernel, tiles, constants in kernels:
        needed = shared_memory(kernel, dtype, width, tiles, capability, **constants)
        assert 0 < needed <= SHARED[capability] * 1024, kernel
