"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A."""

from dataclasses import dataclass

from megatron.bridge.training.config import OptimizerConfigOverrideProvider, OptimizerConfigOverrideProviderContext
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride


@dataclass
class LoRAPlus(OptimizerConfigOverrideProvider):
    """A learning rate of their own for the adapters' B matrices.

    Attributes:
        ratio: B's learning rate over A's, at every step of the schedule.
    """

    ratio: float = 1.0

    def build_config_overrides(
        self, context: OptimizerConfigOverrideProviderContext
    ) -> dict[ParamKey, ParamGroupOverride]:
        """Megatron-Bridge's own overrides and ours."""
        optimizer = context.optimizer_config
        faster = ParamGroupOverride(max_lr=optimizer.lr * self.ratio, min_lr=optimizer.min_lr * self.ratio)
        overrides = super().build_config_overrides(context) or {}
        return {**overrides, ParamKey(name="*linear_out.weight"): faster}
