"""Settings that all mixtures of experts share."""

from megatron.bridge.models.gpt_provider import GPTModelProvider


def set_mixture(provider: GPTModelProvider, config) -> None:
    """Set the load-balancing loss and how experts are divided.

    The loss is added only where config.json has `output_router_logits`, which is what transformers trains with. Tensor
    parallelism leaves experts whole: they are small, and upstream adds an adapter on a divided one once per process.
    """
    provider.moe_router_load_balancing_type = "aux_loss" if config.output_router_logits else "none"
    provider.moe_aux_loss_coeff = config.router_aux_loss_coef if config.output_router_logits else 0.0
    provider.expert_tensor_parallel_size = 1
