"""Qwen3, mixture of experts: upstream's bridge, with a load-balancing loss only where the model asks for it."""

from typing import TYPE_CHECKING

from megatron.bridge.models.conversion.auto_bridge import transformers
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge
from megatron.core.models.gpt.gpt_model import GPTModel

from posttrain.models.bridges.experts import SeparateExperts
from posttrain.models.bridges.mixture import set_mixture
from posttrain.models.bridges.whole_config import WholeConfig

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


# `transformers` as AutoBridge sees it: the key under which upstream has registered its bridge, which this one replaces.
@MegatronModelBridge.register_bridge(source=transformers.Qwen3MoeForCausalLM, target=GPTModel, model_type="qwen3_moe")
class BalancedQwen3MoEBridge(SeparateExperts, WholeConfig, Qwen3MoEBridge):
    """Qwen3MoeForCausalLM <-> GPTModel."""

    def provider_bridge(self, hf_pretrained: "PreTrainedCausalLM") -> GPTModelProvider:
        """Convert the config."""
        provider = super().provider_bridge(hf_pretrained)
        set_mixture(provider, hf_pretrained.config)
        return provider
