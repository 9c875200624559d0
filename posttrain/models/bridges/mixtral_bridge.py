"""Mixtral: Mistral's attention, and a mixture of gated experts in every layer."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.conversion.utils import mcore_to_hf_window_size
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM

from posttrain.models.bridges.experts import SeparateExperts
from posttrain.models.bridges.mixture import set_mixture
from posttrain.models.bridges.whole_config import WholeConfig

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(SeparateExperts, WholeConfig, MegatronModelBridge):
    """MixtralForCausalLM <-> GPTModel."""

    def provider_bridge(self, hf_pretrained: "PreTrainedCausalLM") -> GPTModelProvider:
        """Convert the config."""
        config = hf_pretrained.config
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        provider.hidden_dropout = 0.0
        provider.moe_ffn_hidden_size = config.intermediate_size
        provider.moe_router_pre_softmax = False  # the chosen experts' weights sum to one
        provider.moe_token_dispatcher_type = "alltoall"
        provider.moe_grouped_gemm = True
        provider.moe_permute_fusion = True
        set_mixture(provider, config)
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: GPTModelProvider) -> dict[str, Any]:
        """Convert the provider back into the fields of a config.json."""
        config = super().megatron_to_hf_config(provider)
        window = mcore_to_hf_window_size(provider.window_size)
        return config | {
            "intermediate_size": provider.moe_ffn_hidden_size,
            "sliding_window": window,
        }

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Names in Megatron (grouped experts and one by one) <-> names in Hugging Face."""
        layer, here = "decoder.layers.*.", "model.layers.*."
        experts, expert = f"{layer}mlp.experts.", f"{here}block_sparse_moe.experts.*."
        plain = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            f"{layer}self_attention.linear_qkv.layer_norm_weight": f"{here}input_layernorm.weight",
            f"{layer}self_attention.linear_proj.weight": f"{here}self_attn.o_proj.weight",
            f"{layer}pre_mlp_layernorm.weight": f"{here}post_attention_layernorm.weight",
            f"{layer}mlp.router.weight": f"{here}block_sparse_moe.gate.weight",
            f"{experts}linear_fc2.weight*": f"{expert}w2.weight",
            f"{experts}local_experts.*.linear_fc2.weight": f"{expert}w2.weight",
        }
        gated = (f"{experts}linear_fc1.weight*", f"{experts}local_experts.*.linear_fc1.weight")
        qkv = QKVMapping(
            f"{layer}self_attention.linear_qkv.weight",
            q=f"{here}self_attn.q_proj.weight",
            k=f"{here}self_attn.k_proj.weight",
            v=f"{here}self_attn.v_proj.weight",
        )
        return MegatronMappingRegistry(
            *(AutoMapping(megatron, hf) for megatron, hf in plain.items()),
            *(GatedMLPMapping(name, gate=f"{expert}w1.weight", up=f"{expert}w3.weight") for name in gated),
            qkv,
        )
