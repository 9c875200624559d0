"""Products with a frozen weight: in its own format, or in E4M3 with a scale per output feature.

An 8-bit weight takes half the memory of bf16 and is quantised once; the other operand is quantised by rows (tokens)
for each product. In the backward pass the sum runs over the weight's scales, so they are multiplied into the upstream
gradient first, and one copy of the weight serves both passes.
"""

from dataclasses import dataclass

import torch

E4M3_MAX = 448.0


@dataclass
class Weight:
    """A frozen matrix: `data` [out, in]; `scale` float32[out] where data is E4M3, else None."""

    data: torch.Tensor
    scale: torch.Tensor | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: [t, in] -> [t, out]."""
        if self.scale is None:
            return x @ self.data.t()
        eight, scale = quantise(x)
        if not x.is_cuda:
            return _dequantise(eight, scale, x.dtype) @ _dequantise(self.data, self.scale, x.dtype).t()
        return torch._scaled_mm(
            eight,
            self.data.t(),
            scale_a=scale[:, None],
            scale_b=self.scale[None],
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    def gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        """upstream W: [t, out] -> [t, in]."""
        if self.scale is None:
            return upstream @ self.data
        eight, scale = quantise(upstream, self.scale)
        if not upstream.is_cuda:
            return _dequantise(eight, scale, upstream.dtype) @ self.data.to(upstream.dtype)
        from posttrain.ops.triton_kernels import transpose

        # Hopper's 8-bit products want both operands along the sum: a transposed copy, for this product alone.
        one = torch.ones(1, self.data.size(1), device=upstream.device)
        return torch._scaled_mm(
            eight,
            transpose(self.data).t(),
            scale_a=scale[:, None],
            scale_b=one,
            out_dtype=upstream.dtype,
            use_fast_accum=True,
        )


def quantise(values: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 of [t, n] and float32[t], what to multiply each row with; columns [n] are multiplied in first."""
    if values.is_cuda:
        from posttrain.ops import triton_kernels

        return triton_kernels.quantise(values.contiguous(), columns)
    values = values.float()
    if columns is not None:
        values = values * columns
    scale = values.abs().amax(1).clamp_min(1e-30) / E4M3_MAX
    return (values / scale[:, None]).to(torch.float8_e4m3fn), scale


def _dequantise(eight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (eight.float() * scale[:, None]).to(dtype)
