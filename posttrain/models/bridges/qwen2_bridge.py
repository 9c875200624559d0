"""Qwen2: upstream's bridge, with every field of config.json honoured."""

from megatron.bridge.models.conversion.auto_bridge import transformers
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.qwen.qwen2_bridge import Qwen2Bridge
from megatron.core.models.gpt.gpt_model import GPTModel

from posttrain.models.bridges.whole_config import WholeConfig


# `transformers` as AutoBridge sees it: the key under which upstream has registered its bridge, which this one replaces.
@MegatronModelBridge.register_bridge(source=transformers.Qwen2ForCausalLM, target=GPTModel, model_type="qwen2")
class WholeQwen2Bridge(WholeConfig, Qwen2Bridge):
    """Qwen2ForCausalLM <-> GPTModel."""
