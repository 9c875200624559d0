"""Triton kernels of activations, in tiles of [tokens, features]. Import it only where there is a GPU.

Rows are contiguous. Arithmetic is in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl

from posttrain.ops.low_rank import LowRank

TILE = (32, 128)  # tokens, features
TILE_WARPS = 4


@triton.jit
def _activate(x, FUNCTION: tl.constexpr):
    """The function of x, and its derivative."""
    if FUNCTION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # the normal distribution's
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * below, below + x * density
    inner = x
    slope = 1.0
    if FUNCTION == "gelu_tanh":  # 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    sigmoid = tl.sigmoid(inner)
    activated = x * sigmoid
    return activated, sigmoid + activated * (1.0 - sigmoid) * slope


@triton.jit
def _tile(tensor, row, column, here, inside, width):
    """A tile of [t, width]; `here` and `inside`: which rows and columns there are."""
    return tl.load(tensor + row[:, None] * width + column[None, :], here[:, None] & inside[None, :], 0)


@triton.jit
def _left(left, row, here, rank, RANK: tl.constexpr):
    """Rows of the left factor [t, r], padded."""
    nth = tl.arange(0, RANK)
    return tl.load(left + row[:, None] * rank + nth[None, :], here[:, None] & (nth < rank)[None, :], 0)


@triton.jit
def _right(right, column, inside, rank, along_rank, along_column, RANK: tl.constexpr):
    """Columns of the right factor [r, n], padded."""
    nth = tl.arange(0, RANK)
    places = right + nth[:, None] * along_rank + column[None, :] * along_column
    return tl.load(places, (nth < rank)[:, None] & inside[None, :], 0)


@triton.jit
def _activation(
    values,
    bias,
    left,
    right,
    out,
    rows,
    width,
    rank,
    along_rank,
    along_column,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = row < rows
    inside = column < width
    both = width
    if GATED:
        both = 2 * width
    second = width + column
    # Everything is read before the first product: nothing is read ahead of the barriers that products bring with them.
    x = _tile(values, row, column, here, inside, both).to(tl.float32)
    if GATED:
        up = _tile(values, row, second, here, inside, both).to(tl.float32)
    if RANK:
        low = _left(left, row, here, rank, RANK)
        of_x = _right(right, column, inside, rank, along_rank, along_column, RANK)
        if GATED:
            of_up = _right(right, second, inside, rank, along_rank, along_column, RANK)
    if BIAS:
        x += tl.load(bias + column, inside, 0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + second, inside, 0).to(tl.float32)[None, :]
    if RANK:
        x += tl.dot(low, of_x, input_precision="ieee")
        if GATED:
            up += tl.dot(low, of_up, input_precision="ieee")
    activated, _ = _activate(x, FUNCTION)
    if GATED:
        activated *= up
    tl.store(out + row[:, None] * width + column[None, :], activated, here[:, None] & inside[None, :])


@triton.jit
def _activation_backward(
    values,
    bias,
    left,
    right,
    upstream,
    upstream_left,
    upstream_right,
    gradient,
    out,
    rows,
    width,
    rank,
    along_rank,
    along_column,
    upstream_rank,
    upstream_along_rank,
    upstream_along_column,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    UPSTREAM_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = row < rows
    inside = column < width
    mask = here[:, None] & inside[None, :]
    both = width
    if GATED:
        both = 2 * width
    second = width + column
    # As above.
    x = _tile(values, row, column, here, inside, both).to(tl.float32)
    grad_out = _tile(upstream, row, column, here, inside, width).to(tl.float32)
    if GATED:
        up = _tile(values, row, second, here, inside, both).to(tl.float32)
    if RANK:
        low = _left(left, row, here, rank, RANK)
        of_x = _right(right, column, inside, rank, along_rank, along_column, RANK)
        if GATED:
            of_up = _right(right, second, inside, rank, along_rank, along_column, RANK)
    if UPSTREAM_RANK:
        upstream_low = _left(upstream_left, row, here, upstream_rank, UPSTREAM_RANK)
        of_upstream = _right(
            upstream_right, column, inside, upstream_rank, upstream_along_rank, upstream_along_column, UPSTREAM_RANK
        )
    if BIAS:
        x += tl.load(bias + column, inside, 0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + second, inside, 0).to(tl.float32)[None, :]
    if RANK:
        x += tl.dot(low, of_x, input_precision="ieee")
        if GATED:
            up += tl.dot(low, of_up, input_precision="ieee")
    if UPSTREAM_RANK:
        grad_out += tl.dot(upstream_low, of_upstream, input_precision="ieee")
    activated, slope = _activate(x, FUNCTION)
    place = gradient + row[:, None] * both + column[None, :]
    if GATED:
        tl.store(place + width, grad_out * activated, mask)
        grad_out *= up
        activated *= up
    tl.store(place, grad_out * slope, mask)
    tl.store(out + row[:, None] * width + column[None, :], activated, mask)


def activation(
    values: torch.Tensor, function: str, gated: bool, bias: torch.Tensor | None, added: LowRank | None = None
) -> torch.Tensor:
    """As posttrain.ops.recomputed_norms.Activation: [t, f], gated [t, 2 f], -> [t, f]."""
    rows, width = values.shape
    if gated:
        width //= 2
    out = values.new_empty(rows, width)
    _activation[_tiles(rows, width)](
        values,
        _or(bias, values),
        *_factors(added, values),
        out,
        rows,
        width,
        *_strides(added),
        FUNCTION=function,
        GATED=gated,
        BIAS=bias is not None,
        RANK=_padded_rank(added),
        ROWS=TILE[0],
        COLUMNS=TILE[1],
        num_warps=TILE_WARPS,
    )
    return out


def activation_backward(
    upstream: torch.Tensor,
    values: torch.Tensor,
    function: str,
    gated: bool,
    bias: torch.Tensor | None,
    added: LowRank | None = None,
    upstream_added: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `values` from upstream + upstream_added, and activation(values, ...) again."""
    rows, width = upstream.shape
    gradient = torch.empty_like(values)
    out = torch.empty_like(upstream)
    _activation_backward[_tiles(rows, width)](
        values,
        _or(bias, values),
        *_factors(added, values),
        upstream,
        *_factors(upstream_added, values),
        gradient,
        out,
        rows,
        width,
        *_strides(added),
        *_strides(upstream_added),
        FUNCTION=function,
        GATED=gated,
        BIAS=bias is not None,
        RANK=_padded_rank(added),
        UPSTREAM_RANK=_padded_rank(upstream_added),
        ROWS=TILE[0],
        COLUMNS=TILE[1],
        num_warps=TILE_WARPS,
    )
    return gradient, out


def _tiles(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, TILE[0]), triton.cdiv(width, TILE[1])


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A kernel's argument, of which it makes no use where there is no tensor."""
    if tensor is None:
        return unused
    return tensor


def _factors(added: LowRank | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if added is None:
        return unused, unused
    return added.left, added.right


def _strides(added: LowRank | None) -> tuple[int, int, int]:
    """Rank, and the strides of the right factor."""
    if added is None:
        return 0, 0, 0
    return added.left.size(1), added.right.stride(0), added.right.stride(1)


def _padded_rank(added: LowRank | None) -> int:
    """Tensor cores multiply at least 16 by 16."""
    if added is None:
        return 0
    return max(16, triton.next_power_of_2(added.left.size(1)))
