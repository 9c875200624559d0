"""Triton kernels: cross entropy, and fp8 by rows. Import it only where there is a GPU.

Rows are contiguous. Arithmetic is in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl


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
def _logits(first, column, stride, width, softcap, CAPPED: tl.constexpr):
    """A row's logits in `column`, soft-capped: softcap tanh(logit / softcap); -inf beyond the row.

    Whole rows are read, up to the next one: several numbers at once, where the stride is a multiple of 16.
    """
    x = tl.load(first + column, column < stride, 0.0).to(tl.float32)
    if CAPPED:
        x = softcap * (2.0 * tl.sigmoid(x * (2.0 / softcap)) - 1.0)
    return tl.where(column < width, x, float("-inf"))


@triton.jit
def _log_sum(first, stride, width, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """A row's largest logit, and the sum of exp(logit - largest)."""
    largest = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        x = _logits(first, start + tl.arange(0, BLOCK), stride, width, softcap, CAPPED)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    return largest, total


@triton.jit
def _store_gradient(first, column, label, log_sum, stride, width, softcap, CAPPED: tl.constexpr):
    """Overwrite a row's logits in `column` with the gradient of its cross entropy."""
    x = _logits(first, column, stride, width, softcap, CAPPED)
    gradient = tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)
    if CAPPED:
        gradient *= 1.0 - (x / softcap) * (x / softcap)
    tl.store(first + column, tl.where(column < width, gradient, 0.0), column < stride)


@triton.jit
def _cross_entropy(
    logits, labels, losses, stride, width, softcap, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    label = tl.load(labels + row)
    largest, total = _log_sum(first, stride, width, softcap, CAPPED, BLOCK)
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - _logits(first, label, stride, width, softcap, CAPPED))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is overwritten below
        for start in range(0, width, BLOCK):
            _store_gradient(first, start + tl.arange(0, BLOCK), label, log_sum, stride, width, softcap, CAPPED)


@triton.jit
def _log_sum_parts(
    logits,
    labels,
    largest_out,
    total_out,
    target_out,
    stride,
    width,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    label = tl.load(labels + row)
    largest, total = _log_sum(first, stride, width, softcap, CAPPED, BLOCK)
    here = (label >= 0) & (label < width)
    tl.store(largest_out + row, largest)
    tl.store(total_out + row, total)
    target = _logits(first, tl.where(here, label, 0), stride, width, softcap, CAPPED)
    tl.store(target_out + row, tl.where(here, target, 0.0))


@triton.jit
def _log_sum_gradient(logits, labels, log_sums, stride, width, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = logits + row * stride
    _store_gradient(first, column, tl.load(labels + row), tl.load(log_sums + row), stride, width, softcap, CAPPED)


def log_sum_parts(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a part of the vocabulary contributes to a cross entropy.

    Args:
        logits: [k, v], of the part; perhaps the first columns of a tensor.
        labels: int64[k], counted from the part's first token; negative or v and more: the label is in another part.
        softcap: what logits are squashed to first.

    Returns:
        The largest logit, the sum of exp(logit - largest), and the label's logit or 0; each float32[k].
    """
    rows, width = logits.shape
    largest, total, target = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    _log_sum_parts[(rows,)](
        logits,
        labels,
        largest,
        total,
        target,
        logits.stride(0),
        width,
        softcap or 0.0,
        CAPPED=softcap is not None,
        BLOCK=min(16384, triton.next_power_of_2(width)),
        num_warps=16,
    )
    return largest, total, target


def log_sum_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor, softcap: float | None = None
) -> None:
    """Overwrite a part's logits with the gradient of a cross entropy.

    Args:
        logits: [k, v]; where they are the first columns of a tensor, its others are lost.
        labels: int64[k], see `log_sum_parts`.
        log_sums: float32[k], of the whole vocabulary.
        softcap: what logits are squashed to.
    """
    rows, width = logits.shape
    _log_sum_gradient[(rows, triton.cdiv(width, 4096))](
        logits,
        labels,
        log_sums,
        logits.stride(0),
        width,
        softcap or 0.0,
        CAPPED=softcap is not None,
        BLOCK=4096,
        num_warps=8,
    )


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, gradient: bool, softcap: float | None = None
) -> None:
    """Compute cross entropies in place, without waiting for the device.

    Args:
        logits: [k, v], perhaps the first columns of a tensor; with `gradient` overwritten with d loss / d logits, the
            tensor's other columns are lost.
        labels: int64[k].
        losses: float32[k], filled.
        gradient: whether the gradient is needed.
        softcap: what logits are squashed to first.
    """
    rows, width = logits.shape
    _cross_entropy[(rows,)](
        logits,
        labels,
        losses,
        logits.stride(0),
        width,
        softcap or 0.0,
        CAPPED=softcap is not None,
        GRADIENT=gradient,
        BLOCK=min(16384, triton.next_power_of_2(width)),
        num_warps=16,
    )


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
