"""StarCoder2 <-> Megatron: which fields of config.json are which of Megatron's, and which tensor becomes which."""

from typing import ClassVar

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, QKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Starcoder2ForCausalLM

from posttrain.models.bridges.whole_config import WholeConfig

LAYER, HERE = "decoder.layers.*.", "model.layers.*."
# Megatron's name (a norm before a linear layer belongs to it) -> Hugging Face's.
MODULES = {
    f"{LAYER}self_attention.linear_qkv.layer_norm_": f"{HERE}input_layernorm.",
    f"{LAYER}self_attention.linear_proj.": f"{HERE}self_attn.o_proj.",
    f"{LAYER}mlp.linear_fc1.layer_norm_": f"{HERE}post_attention_layernorm.",
    f"{LAYER}mlp.linear_fc1.": f"{HERE}mlp.c_fc.",
    f"{LAYER}mlp.linear_fc2.": f"{HERE}mlp.c_proj.",
    "decoder.final_layernorm.": "model.norm.",
}


@MegatronModelBridge.register_bridge(source=Starcoder2ForCausalLM, target=GPTModel, model_type="starcoder2")
class Starcoder2Bridge(WholeConfig, MegatronModelBridge):
    """Starcoder2ForCausalLM <-> GPTModel; rotary embedding, windows and activation are WholeConfig's to set."""

    # Fields of config.json that upstream's table lacks, with the provider's names for them.
    CONFIG_MAPPING: ClassVar = [
        *MegatronModelBridge.CONFIG_MAPPING, ("norm_epsilon", "layernorm_epsilon"), ("use_bias", "add_bias_linear"),
        ("residual_dropout", "hidden_dropout"),
    ]  # fmt: skip

    def provider_bridge(self, hf_pretrained) -> GPTModelProvider:
        """Convert the config."""
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization, provider.gated_linear_unit = "LayerNorm", False
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Which tensor becomes which; queries, keys and values are one matrix in Megatron."""
        kinds = ("weight", "bias")
        qkv = [
            QKVMapping(
                f"{LAYER}self_attention.linear_qkv.{kind}", **{n: f"{HERE}self_attn.{n}_proj.{kind}" for n in "qkv"}
            )
            for kind in kinds
        ]
        plain = [AutoMapping(mine + kind, theirs + kind) for mine, theirs in MODULES.items() for kind in kinds]
        embedding = AutoMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight")
        return MegatronMappingRegistry(embedding, AutoMapping("output_layer.weight", "lm_head.weight"), *qkv, *plain)
