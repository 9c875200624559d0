"""Products with a frozen weight: in its own format, or in E4M3 with a scale per output feature.

An 8-bit weight takes half the memory of bf16 and is quantised once; the other operand is quantised by rows (tokens)
for each product. In the backward pass the sum runs over the weight's scales, so they are multiplied into the upstream
gradient first, and one copy of the weight serves both passes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

E4M3_MAX = 448.0


@dataclass
class Weight:
    """A frozen matrix: `data` [out, in]; `scale` float32[out] where data is E4M3, else None."""

    data: torch.Tensor
    scale: torch.Tensor | None = None

    def product(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T: [t, in] -> [t, out]; into `out`."""
        if self.scale is None:
            return torch.mm(x, self.data.t(), out=out)
        eight, scale = quantise(x)
        if not x.is_cuda:
            return torch.mm(
                _dequantise(eight, scale, x.dtype), _dequantise(self.data, self.scale, x.dtype).t(), out=out
            )
        return eight_bit_product(eight, scale, self.data.t(), self.scale, x.dtype, out)

    def gradient_product(self) -> "Product":
        """The function of (upstream, out or None) that gives upstream W: [t, out] -> [t, in], into `out`.

        What it prepares serves every part of the tokens.
        """
        if self.scale is None:
            return lambda upstream, out: torch.mm(upstream, self.data, out=out)
        if not self.data.is_cuda:
            return self._dequantised_gradient
        from posttrain.ops.triton_kernels import transpose

        # Hopper's 8-bit products want both operands along the sum: a transposed copy, for these products alone.
        transposed = transpose(self.data)
        ones = torch.ones(self.data.size(1), device=self.data.device)

        def gradient(upstream: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            eight, scale = quantise(upstream, self.scale)
            return eight_bit_product(eight, scale, transposed.t(), ones, upstream.dtype, out)

        return gradient

    def _dequantised_gradient(self, upstream: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        eight, scale = quantise(upstream, self.scale)
        return torch.mm(_dequantise(eight, scale, upstream.dtype), self.data.to(upstream.dtype), out=out)


class EightBitWeight(torch.nn.Parameter):
    """A layer's frozen matrix [out, in] in E4M3: what is copied into it is quantised by rows.

    Its numbers are kept as integers, which nothing converts into the model's number format; in a matrix that
    Megatron-FSDP divides, as pairs.

    Attributes:
        scale: float32[out], what the rows are multiplied with.
    """

    scale: torch.Tensor

    @classmethod
    def in_place_of(cls, former: torch.nn.Parameter, numbers: torch.Tensor, scale: torch.Tensor) -> "EightBitWeight":
        """The matrix of uint8[out, in] and float32[out], divided over tensor-parallel processes as `former` is."""
        weight = cls(numbers, requires_grad=False)
        weight.__dict__.update(former.__dict__)
        weight.scale = scale
        return weight

    @classmethod
    def to_be_divided(cls, former: torch.nn.Parameter) -> "EightBitWeight":
        """A matrix in place of `former` [out, in] for Megatron-FSDP, which divides floating-point parameters alone.

        Two neighbours in a row are one bfloat16[out, in / 2], with which nothing is computed: it is only copied. No
        two finite numbers of E4M3 are an infinite one there. Until the matrix is divided it is a single zero, so that
        no process ever holds the whole model.
        """
        rows, columns = former.shape
        pairs = torch.zeros(1, 1, dtype=torch.bfloat16, device=former.device).expand(rows, columns // 2)
        return cls.in_place_of(former, pairs, torch.ones(rows, device=former.device))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The format in which Megatron-Bridge hands over what is copied into it, divided or not; that of pairs too."""
        return torch.bfloat16

    @property
    def weight(self) -> Weight:
        """As products take it."""
        return Weight(self.data.view(torch.float8_e4m3fn), self.scale)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "EightBitWeight":
        """Quantise `source` [out, in] into this."""
        eight, scale = quantise(source.detach().to(self.device))
        self.data.copy_(eight.view(torch.uint8))
        self.scale.copy_(scale)
        return self


type Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def eight_bit_product(
    eight: torch.Tensor,
    scale: torch.Tensor,
    other: torch.Tensor,
    other_scale: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """eight other of E4M3 [t, k] and [k, n], with scales [t] of rows and [n] of columns, into `out`, in `dtype`."""
    return torch._scaled_mm(
        eight,
        other,
        scale_a=scale[:, None],
        scale_b=other_scale[None],
        out_dtype=dtype,
        use_fast_accum=True,
        out=out,
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
