"""Settings that all mixtures of experts share."""

from typing import TYPE_CHECKING

from megatron.bridge.models.gpt_provider import GPTModelProvider

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def set_mixture(provider: GPTModelProvider, config: "PretrainedConfig") -> None:
    """Set the load-balancing loss and how experts are divided.

    The loss is added only where config.json has `output_router_logits`, which is what transformers trains with. Tensor
    parallelism leaves experts whole: they are small, and upstream adds an adapter on a divided one once per process.
    """
    provider.moe_router_load_balancing_type = "none"
    provider.moe_aux_loss_coeff = 0.0
    if config.output_router_logits:
        provider.moe_router_load_balancing_type = "aux_loss"
        provider.moe_aux_loss_coeff = config.router_aux_loss_coef
    provider.expert_tensor_parallel_size = 1
