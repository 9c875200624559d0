"""Triton kernels of norms, a row a program. Import it only where there is a GPU.

Rows are contiguous. Arithmetic is in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _normalised(x, inside, width, eps, CENTRED: tl.constexpr):
    """x / rms(x), or (x - mean) / deviation, and the factor."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    return x * factor, factor


@triton.jit
def _scaled(normalised, gain, shift, column, inside, CENTRED: tl.constexpr):
    y = normalised * gain
    if CENTRED:
        y += tl.load(shift + column, inside, 0).to(tl.float32)
    return y


@triton.jit
def _norm(values, gains, shift, out, width, eps, offset, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(values + row * width + column, inside, 0).to(tl.float32)
    gain = tl.load(gains + column, inside, 0).to(tl.float32) + offset
    normalised, _ = _normalised(x, inside, width, eps, CENTRED)
    tl.store(out + row * width + column, _scaled(normalised, gain, shift, column, inside, CENTRED), inside)


@triton.jit
def _norm_backward(
    values, gains, shift, upstream, gradient, out, width, eps, offset, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(values + row * width + column, inside, 0).to(tl.float32)
    gain = tl.load(gains + column, inside, 0).to(tl.float32) + offset
    grad_y = tl.load(upstream + row * width + column, inside, 0).to(tl.float32) * gain
    normalised, factor = _normalised(x, inside, width, eps, CENTRED)
    tl.store(out + row * width + column, _scaled(normalised, gain, shift, column, inside, CENTRED), inside)
    grad_x = grad_y - normalised * (tl.sum(grad_y * normalised, 0) / width)
    if CENTRED:
        grad_x -= tl.sum(grad_y, 0) / width
    tl.store(gradient + row * width + column, grad_x * factor, inside)


def norm(
    x: torch.Tensor, gains: torch.Tensor, shift: torch.Tensor | None, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """RMSNorm of [t, n] with gains [n] + offset; with a shift [n] LayerNorm."""
    rows, width = x.shape
    out = torch.empty_like(x)
    block, warps = _block(width)
    _norm[(rows,)](
        x,
        gains,
        gains if shift is None else shift,
        out,
        width,
        eps,
        offset,
        CENTRED=shift is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def norm_backward(
    upstream: torch.Tensor,
    x: torch.Tensor,
    gains: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x, and norm(x, ...) again."""
    rows, width = x.shape
    gradient, out = torch.empty_like(x), torch.empty_like(x)
    block, warps = _block(width)
    _norm_backward[(rows,)](
        x,
        gains,
        gains if shift is None else shift,
        upstream,
        gradient,
        out,
        width,
        eps,
        offset,
        CENTRED=shift is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return gradient, out


def _block(width: int) -> tuple[int, int]:
    """Columns of a program, and its warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
