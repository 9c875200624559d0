"""The load-balancing loss of mixtures of experts, under Hugging Face's switch."""

from megatron.bridge.models.gpt_provider import GPTModelProvider


def balancing_loss(provider: GPTModelProvider, config) -> None:
    """Add the loss only where config.json has `output_router_logits`, which is what transformers trains with."""
    provider.moe_router_load_balancing_type = "aux_loss" if config.output_router_logits else "none"
    provider.moe_aux_loss_coeff = config.router_aux_loss_coef if config.output_router_logits else 0.0
