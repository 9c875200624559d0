"""AdamW whose state takes six bytes a weight: Transformer Engine's, as Megatron's precision-aware optimizer uses it.

Moments are in bf16, as in DeepSeek-V3 (arXiv:2412.19437, 3.3.3; its beta2 is 0.95), rounded after each step, whose
arithmetic is fp32. Of the fp32 weights the lower 16 bits are kept: the upper ones are the bf16 weights'. So nothing is
lost of the weights. Megatron-FSDP has them in fp32 itself, and the moments alone are smaller.
"""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import optimizer as core
from torch.distributed.tensor import DTensor
from transformer_engine.pytorch.optimizers import FusedAdam

if TYPE_CHECKING:
    from megatron.bridge.training.config import OptimizerConfig
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig


class BFloat16Adam(FusedAdam):
    """Transformer Engine's AdamW, whose state is saved and loaded as it is.

    Its own makes fp32 copies of all moments, and on loading a second state, for which there is no room.
    """

    def get_unscaled_state(self, param: torch.nn.Parameter, state_name: str, skip_unscale: bool = True) -> torch.Tensor:
        """The state's own tensor."""
        state: torch.Tensor = super().get_unscaled_state(param, state_name, skip_unscale=True)
        return state

    def set_scaled_state(self, param: torch.nn.Parameter, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Copy into the state's own tensor, rounded to its format."""
        if unscaled_state.is_floating_point():
            unscaled_state = unscaled_state.float()
        super().set_scaled_state(param, state_name, unscaled_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the tensors of a state; Megatron fills them afterwards."""
        states = state_dict["state"]
        if any(isinstance(tensor, DTensor) for state in states.values() for tensor in state.values()):
            super().load_state_dict(state_dict)  # of Megatron-FSDP, under names
            return
        torch.optim.Optimizer.load_state_dict(self, {**state_dict, "state": {}})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                if index in states:
                    self.state[parameter] = dict(states[index])
                    one = torch.ones(1, dtype=torch.float32, device=parameter.device)
                    self._scales[parameter] = dict.fromkeys(states[index], one)


def use(optimizer: "OptimizerConfig", mixed: "MixedPrecisionConfig") -> None:
    """Have Megatron build it, over bf16 weights.

    Args:
        optimizer, mixed: changed in place.
    """
    optimizer.exp_avg_dtype = torch.bfloat16
    optimizer.exp_avg_sq_dtype = torch.bfloat16
    mixed.fp8_recipe = "delayed"  # of products that aren't in 8 bits; beside others Megatron keeps fp32 weights
    core.Adam = BFloat16Adam
