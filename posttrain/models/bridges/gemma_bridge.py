"""Gemma: upstream's bridge, without its insistence on one attention kernel."""

from typing import TYPE_CHECKING

from megatron.bridge.models.conversion.auto_bridge import transformers
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.gemma.gemma_bridge import GemmaBridge
from megatron.bridge.models.gemma.gemma_provider import GemmaModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend

from posttrain.models.bridges.whole_config import WholeConfig

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


# `transformers` as AutoBridge sees it: the key under which upstream has registered its bridge, which this one replaces.
@MegatronModelBridge.register_bridge(
    source=transformers.GemmaForCausalLM, target=GPTModel, provider=GemmaModelProvider, model_type="gemma"
)
class AnyKernelGemmaBridge(WholeConfig, GemmaBridge):
    """GemmaForCausalLM <-> GPTModel."""

    def provider_bridge(self, hf_pretrained: "PreTrainedCausalLM") -> GemmaModelProvider:
        """Convert the config; upstream asks for flash-attn, which need not be there and which local layers lack."""
        provider = super().provider_bridge(hf_pretrained)
        provider.attention_backend = AttnBackend.auto
        return provider
