"""Triton kernels of a mixture's experts. Import it only where there is a GPU.

Rows are contiguous. Arithmetic is in fp32, rounded once. Where rows may be absent (PARTIAL), nothing is read of those
that are, and of a result with one number for each row (scales, gradients of weights) alone anything is written.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _weighted_swiglu(
    both, added, token, weight, out, width, ADDED: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PARTIAL:
        inside &= tl.load(token + row) >= 0
    gate = tl.load(both + row * 2 * width + column, inside, 0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, inside, 0).to(tl.float32)
    if ADDED:
        more = added + tl.load(token + row) * 2 * width
        gate += tl.load(more + column, inside, 0).to(tl.float32)
        up += tl.load(more + width + column, inside, 0).to(tl.float32)
    factor = tl.load(weight + row).to(tl.float32)
    tl.store(out + row * width + column, factor * gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _weighted_swiglu_backward(
    upstream,
    upstream_of_sum,
    both,
    added,
    token,
    weight,
    gradient,
    grad_weight,
    width,
    SUM: tl.constexpr,
    ADDED: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weight + row).to(tl.float32)
    source = tl.load(token + row)
    total = 0.0  # of the gradient of the weight
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        if PARTIAL:
            inside &= source >= 0
        gate = tl.load(both + row * 2 * width + column, inside, 0).to(tl.float32)
        up = tl.load(both + row * 2 * width + width + column, inside, 0).to(tl.float32)
        if ADDED:
            more = added + source * 2 * width
            gate += tl.load(more + column, inside, 0).to(tl.float32)
            up += tl.load(more + width + column, inside, 0).to(tl.float32)
        grad_out = tl.load(upstream + row * width + column, inside, 0).to(tl.float32)
        if SUM:
            grad_out += tl.load(upstream_of_sum + source * width + column, inside, 0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(grad_out * silu * up, 0)
        grad_out *= factor
        grad_gate = grad_out * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(gradient + row * 2 * width + column, grad_gate, inside)
        tl.store(gradient + row * 2 * width + width + column, grad_out * silu, inside)
    tl.store(grad_weight + row, total)


@triton.jit
def _sum_rows(values, rows, out, width, CHOSEN: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for nth in tl.static_range(CHOSEN):
        row = tl.load(rows + token * CHOSEN + nth)
        wanted = inside
        if PARTIAL:
            wanted = inside & (row >= 0)
        total += tl.load(values + row * width + column, wanted, 0).to(tl.float32)
    tl.store(out + token * width + column, total, inside)


@triton.jit
def _take_rows(values, source, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(source + row)
    inside = (column < width) & (place >= 0)
    tl.store(out + row * width + column, tl.load(values + place * width + column, inside, 0), inside)


@triton.jit
def _quantise_rows(
    values,
    source,
    columns,
    expert,
    present,
    out,
    scales,
    width,
    GIVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if PARTIAL:
        inside &= tl.load(present + row) >= 0
    place = row
    if GIVEN:
        place = tl.load(source + row)
    x = tl.load(values + place * width + column, inside, 0).to(tl.float32)
    if COLUMNS:
        x *= tl.load(columns + tl.load(expert + row) * width + column, inside, 0)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-30) / 448.0  # the largest number of E4M3
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, (x / scale).to(out.dtype.element_ty), inside)


@triton.jit
def _transpose(values, out, rows, columns, BLOCK: tl.constexpr):
    first = tl.program_id(2).to(tl.int64) * rows * columns
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(values + first + row.to(tl.int64)[:, None] * columns + column[None, :], inside, 0)
    inside_out = (column < columns)[:, None] & (row < rows)[None, :]
    target = out + first + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(target, tl.trans(tile), inside_out)


def weighted_swiglu(
    both: torch.Tensor,
    added: torch.Tensor | None,
    token: torch.Tensor,
    weight: torch.Tensor,
    partial: bool = False,
) -> torch.Tensor:
    """As posttrain.ops.grouped_experts.weighted_swiglu."""
    rows = both.size(0)
    width = both.size(1) // 2
    out = both.new_empty(rows, width)
    block = min(2048, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    given = both if added is None else added.contiguous()
    _weighted_swiglu[grid](
        both,
        given,
        token,
        weight,
        out,
        width,
        ADDED=added is not None,
        PARTIAL=partial,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


def weighted_swiglu_backward(
    upstream: torch.Tensor,
    upstream_of_sum: torch.Tensor | None,
    both: torch.Tensor,
    added: torch.Tensor | None,
    token: torch.Tensor,
    weight: torch.Tensor,
    partial: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As posttrain.ops.grouped_experts.weighted_swiglu_backward."""
    rows, width = upstream.shape
    gradient = torch.empty_like(both)
    grad_weight = torch.empty(rows, dtype=torch.float32, device=both.device)
    block = min(2048, triton.next_power_of_2(width))
    _weighted_swiglu_backward[(rows,)](
        upstream,
        upstream if upstream_of_sum is None else upstream_of_sum.contiguous(),
        both,
        both if added is None else added.contiguous(),
        token,
        weight,
        gradient,
        grad_weight,
        width,
        SUM=upstream_of_sum is not None,
        ADDED=added is not None,
        PARTIAL=partial,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return gradient, grad_weight


def sum_rows(values: torch.Tensor, rows: torch.Tensor, partial: bool = False) -> torch.Tensor:
    """As posttrain.ops.grouped_experts.sum_rows."""
    tokens, chosen = rows.shape
    width = values.size(1)
    out = values.new_empty(tokens, width)
    block = min(2048, triton.next_power_of_2(width))
    grid = (tokens, triton.cdiv(width, block))
    _sum_rows[grid](values, rows, out, width, CHOSEN=chosen, PARTIAL=partial, BLOCK=block, num_warps=_warps(block))
    return out


def take_rows(values: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The rows int64[r] of [t, n] -> [r, n]; those whose number is negative are not written."""
    values = values.contiguous()
    width = values.size(1)
    out = values.new_empty(source.size(0), width)
    block = min(2048, triton.next_power_of_2(width))
    grid = (source.size(0), triton.cdiv(width, block))
    _take_rows[grid](values, source, out, width, BLOCK=block, num_warps=_warps(block))
    return out


def quantise_rows(
    values: torch.Tensor,
    source: torch.Tensor | None,
    columns: torch.Tensor | None = None,
    expert: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As posttrain.ops.grouped_experts.quantise_rows."""
    values = values.contiguous()
    width = values.size(1)
    rows = values.size(0) if source is None else source.size(0)
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(rows, dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(width)
    _quantise_rows[(rows,)](
        values,
        scales if source is None else source,
        scales if columns is None else columns,
        scales if expert is None else expert,
        scales if present is None else present,
        out,
        scales,
        width,
        GIVEN=source is not None,
        COLUMNS=columns is not None,
        PARTIAL=present is not None,
        BLOCK=block,
        num_warps=min(32, max(4, block // 1024)),
    )
    return out, scales


def transpose(values: torch.Tensor) -> torch.Tensor:
    """As posttrain.ops.grouped_experts.transposed."""
    experts, rows, columns = values.shape
    out = torch.empty(experts, columns, rows, dtype=torch.int8, device=values.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128), experts)
    _transpose[grid](values.view(torch.int8), out, rows, columns, BLOCK=128, num_warps=8)
    return out.view(values.dtype)


def _warps(block: int) -> int:
    return max(1, block // 256)
