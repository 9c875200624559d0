"""Mistral: upstream's bridge, with every field of config.json honoured."""

from megatron.bridge.models.conversion.auto_bridge import transformers
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.mistral.mistral_bridge import MistralBridge
from megatron.core.models.gpt.gpt_model import GPTModel

from posttrain.models.bridges.whole_config import WholeConfig


# `transformers` as AutoBridge sees it: the key under which upstream has registered its bridge, which this one replaces.
@MegatronModelBridge.register_bridge(source=transformers.MistralForCausalLM, target=GPTModel, model_type="mistral")
class WholeMistralBridge(WholeConfig, MistralBridge):
    """MistralForCausalLM <-> GPTModel."""
