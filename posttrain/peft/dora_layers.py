"""DoRA's layer on matrices with a bias, and on matrices divided over tensor-parallel processes.

Megatron-Bridge's own scales the bias with the magnitudes, which neither the paper nor Hugging Face's PEFT does, so the
exported adapter would be another model than the trained one. Of a matrix divided by its input it takes the norms of
each process's part, so the processes scale the same output differently and drift apart; and the gradient's norm lacks
most magnitudes.
"""

from typing import Any

import torch
from megatron.bridge.peft.dora_layers import DoRALinear, ParallelLinearDoRAAdapter
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes


class WholeNormDoRALinear(DoRALinear):
    """A frozen matrix W with a LoRA pair and a trained length for each output feature."""

    def __init__(self, to_wrap: torch.nn.Module, adapter: ParallelLinearDoRAAdapter) -> None:
        super().__init__(to_wrap, adapter)
        if adapter.is_expert:
            return
        magnitude = adapter.weight_magnitude
        if adapter.input_is_parallel:
            # Whole on every process, each of which sees its part of the sequence: gradients are summed.
            magnitude.sequence_parallel = adapter.config.sequence_parallel
        else:
            # Divided: counted on every process in the gradient's norm.
            set_tensor_model_parallel_attributes(magnitude, True, 0, 1)

    @torch.no_grad()
    def _get_weight_norm(self) -> torch.Tensor:
        """Lengths of the rows of W + scaling B A: [out], or [out of this process] where the output is divided."""
        adapter = self.adapter
        a, b = adapter.linear_in.weight, adapter.linear_out.weight
        divided = parallel_state.get_tensor_model_parallel_world_size() > 1 and not adapter.is_expert
        if divided and adapter.input_is_parallel:
            b = gather(b.T).T
        elif divided:
            a = gather(a.T).T
        weight = self.to_wrap.weight + self.scaling * b @ a  # [out or its part, in or its part]
        lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        if divided and adapter.input_is_parallel:
            squares = lengths.square()
            torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
            lengths = squares.sqrt()
        return lengths.to(weight.dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., in] -> [..., out] and a bias that the caller adds; only the matrix product is scaled."""
        out, bias, hidden = self.base_linear_forward(x)
        if not self._adapter_enabled:
            return out, bias
        dropout = self.adapter.dropout
        scale = self.adapter.get_weight_magnitude() / self._get_weight_norm()  # [out]
        added = None  # the bias that is in `out` already
        if bias is None:
            added = getattr(self.to_wrap, "bias", None)
        if added is None or not added.numel():
            added = 0.0
        result = scale * (out + self.adapter(hidden.contiguous())) + (1 - scale) * added
        if self.training and getattr(dropout, "p", 0.0) > 0:  # W sees x without dropout
            difference, *_ = self.base_linear_forward(dropout(hidden) - hidden)
            result = result + (scale - 1) * (difference - added)
        return result, bias


def with_whole_norm(module: Any) -> torch.nn.Module:
    """`module`, as the layer above if Megatron-Bridge has just wrapped it as its own DoRA layer."""
    if type(module) is DoRALinear:
        return WholeNormDoRALinear(module.to_wrap, module.adapter)
    return module
