"""Triton kernels for a GPU: SwiGLU, cross entropy, and fp8 by rows. Import it where there is one.

Rows are contiguous. Arithmetic is in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0


@triton.jit
def _swiglu(both, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(both + row * 2 * width + at, inside, 0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, inside, 0).to(tl.float32)
    tl.store(out + row * width + at, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward(both, upstream, gradient, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(both + row * 2 * width + at, inside, 0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, inside, 0).to(tl.float32)
    wanted = tl.load(upstream + row * width + at, inside, 0).to(tl.float32)
    half = tl.sigmoid(gate)
    silu = gate * half
    tl.store(out + row * width + at, silu * up, inside)
    tl.store(gradient + row * 2 * width + at, wanted * up * (half + silu * (1 - half)), inside)
    tl.store(gradient + row * 2 * width + width + at, wanted * silu, inside)


@triton.jit
def _quantise(values, columns, out, scales, width, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(values + row * width + at, inside, 0).to(tl.float32)
    if COLUMNS:
        x *= tl.load(columns + at, inside, 0)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-30) / 448.0
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (x / scale).to(out.dtype.element_ty), inside)


@triton.jit
def _transpose(values, out, rows, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(values + row.to(tl.int64)[:, None] * columns + column[None, :], inside, 0)
    there = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(out + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(tile), there)


@triton.jit
def _cross_entropy(logits, labels, losses, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first, label = logits + row * width, tl.load(labels + row)
    most, total = float("-inf"), 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(first + at, at < width, float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(x - larger), 0)
        most = larger
    log_sum = most + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(first + label).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is overwritten below
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(first + at, at < width, float("-inf")).to(tl.float32)
            tl.store(first + at, tl.exp(x - log_sum) - tl.where(at == label, 1.0, 0.0), at < width)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, gradient: bool) -> None:
    """Fill `losses` [k]; with `gradient` overwrite `logits` [k, v] with d loss / d logits. Waits for nothing."""
    rows, width = logits.shape
    block = min(16384, triton.next_power_of_2(width))
    _cross_entropy[rows,](logits, labels, losses, width, GRADIENT=gradient, BLOCK=block, num_warps=16)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [t, 2 f], gates first -> [t, f]."""
    rows, width = both.size(0), both.size(1) // 2
    out = both.new_empty(rows, width)
    _swiglu[rows, triton.cdiv(width, 2048)](both, out, width, BLOCK=2048, num_warps=8)
    return out


def swiglu_backward(upstream: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient [t, 2 f] of `both`, and swiglu(both) again."""
    rows, width = upstream.shape
    gradient, out = torch.empty_like(both), torch.empty_like(upstream)
    grid = rows, triton.cdiv(width, 2048)
    _swiglu_backward[grid](both, upstream, gradient, out, width, BLOCK=2048, num_warps=8)
    return gradient, out


def quantise(values: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 of [t, n], columns first multiplied by `columns` [n]; and the scale float32[t] that each row is to be
    multiplied with."""
    rows, width = values.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(rows, dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(width)
    _quantise[rows,](
        values, values if columns is None else columns, out, scales, width, COLUMNS=columns is not None, BLOCK=block,
        num_warps=min(32, max(4, block // 1024)),
    )  # fmt: skip
    return out, scales


def transpose(values: torch.Tensor) -> torch.Tensor:
    """[m, n] of one-byte numbers -> [n, m], contiguous."""
    out = torch.empty(values.size(1), values.size(0), dtype=torch.int8, device=values.device)
    grid = triton.cdiv(values.size(0), 128), triton.cdiv(values.size(1), 128)
    _transpose[grid](values.view(torch.int8), out, *values.shape, BLOCK=128, num_warps=8)
    return out.view(values.dtype)
