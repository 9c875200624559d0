"""Qwen3: upstream's bridge, with every field of config.json honoured."""

from megatron.bridge.models.conversion.auto_bridge import transformers
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge
from megatron.core.models.gpt.gpt_model import GPTModel

from posttrain.models.bridges.whole_config import WholeConfig


# `transformers` as AutoBridge sees it: the key under which upstream has registered its bridge, which this one replaces.
@MegatronModelBridge.register_bridge(source=transformers.Qwen3ForCausalLM, target=GPTModel, model_type="qwen3")
class WholeQwen3Bridge(WholeConfig, Qwen3Bridge):
    """Qwen3ForCausalLM <-> GPTModel."""
