"""Attention with soft-capped scores over packed sequences as one kernel, by PyTorch's FlexAttention.

Importing it loads Dynamo and Inductor. Nothing here asks the device for a number and every shape follows from the row's
length, so that a step can be captured in a CUDA graph, masks included.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.virtualized import ops
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

BLOCK = 128  # queries and keys of a block of the mask; FlexAttention's own size
# For 16-bit heads above 128 on Hopper. FlexAttention's own backward kernel has more accumulators there than registers,
# so it is given twice the threads. `bench/attention.py --tune` times these and others.
WIDE_HEADS = {
    "fwd_BLOCK_M": 128,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 8,
    "fwd_num_stages": 2,
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 8,
    "bwd_num_stages": 2,
}


@torch.library.custom_op("posttrain::approximate_tanh", mutates_args=())
def approximate_tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh, in compiled kernels by one instruction of the GPU; CUDA's own is some twenty for each score.

    Its relative error is 2^-11 at most (PTX ISA, tanh.approx.f32), that of a number in bf16 2^-9.
    """
    return torch.tanh(x)


@approximate_tanh.register_fake
def _of_any_tensor(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_output(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _gradient(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
    (output,) = ctx.saved_tensors
    return upstream * (1 - output * output)


# Not an autograd.Function: torch's cache (AOTAutogradCache) takes no graph with one, and every process would trace it
# anew.
approximate_tanh.register_autograd(_gradient, setup_context=_keep_output)


@approximate_tanh.register_vmap
def _of_every_score(info: object, dims: tuple[int | None], x: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    return approximate_tanh(x), dims[0]


@register_lowering(torch.ops.posttrain.approximate_tanh)
def _as_one_instruction(x: object) -> object:
    instruction = "tanh.approx.f32 $0, $1;"
    return make_pointwise(
        partial(
            ops.inline_asm_elementwise,
            asm=instruction,
            constraints="=f,f",
            dtype=torch.float32,
            is_pure=True,
            pack=1,
        )
    )(x)


def build_block_mask(first: torch.Tensor) -> BlockMask:
    """The blocks of keys that each block of queries sees, and the reverse for the backward pass.

    Each query sees the keys from one place on up to its own, and these places never go back. So the blocks that a block
    sees are a range: those at its left end may be seen in part, those after them are seen whole, and the last one, its
    own, is seen in part. No block has to be looked into, or sorted.

    Args:
        first: int32[t], non-decreasing: the first key that each query sees.
    """
    total = first.numel()
    count = -(-total // BLOCK)
    block = torch.arange(count, dtype=torch.int32, device=first.device)
    begin = block * BLOCK
    of_first_query = first[::BLOCK].contiguous()
    # A block that the row doesn't fill sees none whole.
    of_last_query = F.pad(first, (0, count * BLOCK - total), value=total)[BLOCK - 1 :: BLOCK].contiguous()

    low = of_first_query // BLOCK
    whole_from = torch.minimum((of_last_query + BLOCK - 1) // BLOCK, block)
    high = torch.searchsorted(of_first_query, begin + BLOCK - 1, right=True, out_int32=True) - 1
    whole_to = torch.searchsorted(of_last_query, begin, right=True, out_int32=True) - 1
    whole_to = torch.maximum(whole_to, block)

    place = block[None]
    own = block[:, None]
    part_left = whole_from - low
    keys = torch.where(place < part_left[:, None], low[:, None] + place, own)
    whole_keys = whole_from[:, None] + place
    queries = torch.where(place == 0, own, whole_to[:, None] + place)
    whole_queries = own + 1 + place

    def counted(number: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In FlexAttention's shapes [batch, heads, blocks]; what follows the counted indices is any that exists."""
        return number[None, None], indices.clamp(max=count - 1)[None, None]

    def is_visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[query]) & (key <= query)

    return BlockMask(
        (total, total),
        *counted(part_left + 1, keys),
        *counted(block - whole_from, whole_keys),
        *counted(high - whole_to + 1, queries),
        *counted(whole_to - block, whole_queries),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_visible,
    )


def kernel_options(query: torch.Tensor) -> FlexKernelOptions:
    """FlexAttention's options for queries of this device, width and number format."""
    options: dict[str, str | int] = {"BACKEND": "TRITON"}  # its kernel for a few queries requires another mask
    wide = query.size(-1) > 128 and query.element_size() == 2
    if wide and query.is_cuda and torch.cuda.get_device_capability(query.device) == (9, 0):
        options |= WIDE_HEADS
    return cast(FlexKernelOptions, options)  # which does not list the prefixed names that it documents


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    softcap: float,
    scale: float,
) -> torch.Tensor:
    """softmax(softcap * tanh(QK^T * scale / softcap))V, compiled when it is first called.

    Rows of one length have kernels of their own; a second length compiles kernels for any.

    Args:
        query: [1, heads, t, d], of any strides.
        key: [1, groups, t, d].
        value: as key.
        mask: see `build_block_mask`.
        softcap: what scores are squashed to.
        scale: of the scores.

    Returns:
        [1, heads, t, d], in memory as `query` is.
    """
    return _attend(query, key, value, mask, softcap, scale, kernel_options(query))


@torch.compile(fullgraph=True)
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    softcap: float,
    scale: float,
    options: FlexKernelOptions,
) -> torch.Tensor:
    tanh = torch.tanh
    if query.is_cuda and query.element_size() == 2:  # whose rounding is coarser than the approximation
        tanh = approximate_tanh

    def cap(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        return softcap * tanh(score * (1.0 / softcap))

    grouped = query.size(1) != key.size(1)
    out = flex_attention(query, key, value, cap, mask, scale, enable_gqa=grouped, kernel_options=options)
    assert isinstance(out, torch.Tensor)  # and no statistics, which were not asked for
    return out
