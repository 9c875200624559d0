"""Triton kernels: SwiGLU, cross entropy, and fp8 by rows. Import it only where there is a GPU.

Rows are contiguous. Arithmetic is in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _swiglu(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, inside, 0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, inside, 0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward(both, upstream, gradient, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, inside, 0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, inside, 0).to(tl.float32)
    grad_out = tl.load(upstream + row * width + column, inside, 0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out + row * width + column, silu * up, inside)
    grad_gate = grad_out * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(gradient + row * 2 * width + column, grad_gate, inside)
    tl.store(gradient + row * 2 * width + width + column, grad_out * silu, inside)


@triton.jit
def _quantise(values, columns, out, scales, width, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(values + row * width + column, inside, 0).to(tl.float32)
    if COLUMNS:
        x *= tl.load(columns + column, inside, 0)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-30) / 448.0  # the largest number of E4M3
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, (x / scale).to(out.dtype.element_ty), inside)


@triton.jit
def _transpose(values, out, rows, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(values + row.to(tl.int64)[:, None] * columns + column[None, :], inside, 0)
    inside_out = (column < columns)[:, None] & (row < rows)[None, :]
    target = out + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(target, tl.trans(tile), inside_out)


@triton.jit
def _cross_entropy(logits, labels, losses, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * width
    label = tl.load(labels + row)
    largest = float("-inf")
    total = 0.0  # of exp(logit - largest)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(first + column, column < width, float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(first + label).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is overwritten below
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(first + column, column < width, float("-inf")).to(tl.float32)
            gradient = tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)
            tl.store(first + column, gradient, column < width)


@triton.jit
def _log_sum_parts(logits, labels, largest_out, total_out, target_out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * width
    label = tl.load(labels + row)
    largest = float("-inf")
    total = 0.0  # of exp(logit - largest)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(first + column, column < width, float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    here = (label >= 0) & (label < width)
    tl.store(largest_out + row, largest)
    tl.store(total_out + row, total)
    tl.store(target_out + row, tl.load(first + label, here, 0.0).to(tl.float32))


@triton.jit
def _log_sum_gradient(logits, labels, log_sums, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = logits + row * width + column
    x = tl.load(place, inside, float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(log_sums + row)) - tl.where(column == tl.load(labels + row), 1.0, 0.0)
    tl.store(place, gradient, inside)


def log_sum_parts(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a part of the vocabulary contributes to a cross entropy.

    Args:
        logits: [k, v], of the part.
        labels: int64[k], counted from the part's first token; negative or v and more: the label is in another part.

    Returns:
        The largest logit, the sum of exp(logit - largest), and the label's logit or 0; each float32[k].
    """
    rows, width = logits.shape
    largest, total, target = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    block = min(16384, triton.next_power_of_2(width))
    _log_sum_parts[(rows,)](logits, labels, largest, total, target, width, BLOCK=block, num_warps=16)
    return largest, total, target


def log_sum_gradient_(logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor) -> None:
    """Overwrite a part's logits [k, v] with the gradient of the cross entropy whose log-sums are float32[k]."""
    rows, width = logits.shape
    grid = (rows, triton.cdiv(width, 4096))
    _log_sum_gradient[grid](logits, labels, log_sums, width, BLOCK=4096, num_warps=8)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, gradient: bool) -> None:
    """Compute cross entropies in place, without waiting for the device.

    Args:
        logits: [k, v]; with `gradient` overwritten with d loss / d logits.
        labels: int64[k].
        losses: float32[k], filled.
        gradient: whether the gradient is needed.
    """
    rows, width = logits.shape
    block = min(16384, triton.next_power_of_2(width))
    _cross_entropy[(rows,)](logits, labels, losses, width, GRADIENT=gradient, BLOCK=block, num_warps=16)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [t, 2 f], gates first -> [t, f]."""
    rows = both.size(0)
    width = both.size(1) // 2
    out = both.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, 2048))
    _swiglu[grid](both, out, width, BLOCK=2048, num_warps=8)
    return out


def swiglu_backward(upstream: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient [t, 2 f] of `both`, and swiglu(both) again."""
    rows, width = upstream.shape
    gradient = torch.empty_like(both)
    out = torch.empty_like(upstream)
    grid = (rows, triton.cdiv(width, 2048))
    _swiglu_backward[grid](both, upstream, gradient, out, width, BLOCK=2048, num_warps=8)
    return gradient, out


def quantise(values: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to E4M3 with a scale per row.

    Args:
        values: [t, n].
        columns: [n], multiplied with the columns of `values` first.

    Returns:
        float8_e4m3fn[t, n], and the scales float32[t] to multiply its rows with.
    """
    rows, width = values.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(rows, dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(width)
    _quantise[(rows,)](
        values,
        values if columns is None else columns,
        out,
        scales,
        width,
        COLUMNS=columns is not None,
        BLOCK=block,
        num_warps=min(32, max(4, block // 1024)),
    )
    return out, scales


def transpose(values: torch.Tensor) -> torch.Tensor:
    """[m, n] of one-byte numbers -> [n, m], contiguous."""
    rows, columns = values.shape
    out = torch.empty(columns, rows, dtype=torch.int8, device=values.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose[grid](values.view(torch.int8), out, rows, columns, BLOCK=128, num_warps=8)
    return out.view(values.dtype)
