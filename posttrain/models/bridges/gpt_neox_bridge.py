"""GPT-NeoX and Pythia: partial rotary embedding, and attention and MLP that read the same input (parallel residual)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformers import GPTNeoXForCausalLM

from posttrain.models.bridges.buffers import KeepsBuffers
from posttrain.models.bridges.whole_config import WholeConfig
from posttrain.models.families.gpt_neox import FAMILY
from posttrain.models.local_spec import Specification, block, local_layer, uses_te

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)), where core's layer is sequential and has no switch."""

    def forward(
        self, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run both halves on the layer's input [s, b, h]; the same arguments and results as core's layer."""
        self._after_attention, context = self._forward_attention(hidden_states, *args, **kwargs)
        output = self._forward_mlp(
            hidden_states, kwargs.get("inference_context"), padding_mask=kwargs.get("padding_mask")
        )
        return output, context

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        """Add the MLP's output to what attention left, not to the layer's input."""
        after_attention, self._after_attention = self._after_attention, None
        return super()._forward_post_mlp(mlp_output_with_bias, after_attention)


def neox_layer_spec(config: "GPTNeoXModelProvider", vp_stage: int | None = None) -> Specification:
    """The usual layer of this platform, its halves in parallel where the model has them so."""
    layer = default_layer_spec(config) if uses_te(config) else local_layer(config)
    if config.use_parallel_residual:
        layer = ModuleSpec(module=ParallelResidualLayer, params=layer.params, submodules=layer.submodules)
    return block(config, layer, vp_stage)


@dataclass
class GPTNeoXModelProvider(GPTModelProvider):
    """GPT-NeoX.

    Attributes:
        use_parallel_residual: attention and MLP read the same input and are added together.
    """

    use_parallel_residual: bool = True
    transformer_layer_spec: ModuleSpec | Callable[..., Specification] = neox_layer_spec


@MegatronModelBridge.register_bridge(
    source=GPTNeoXForCausalLM, target=GPTModel, provider=GPTNeoXModelProvider, model_type="gpt_neox"
)
class GPTNeoXBridge(KeepsBuffers, WholeConfig, MegatronModelBridge):
    """GPTNeoXForCausalLM <-> GPTModel. Its fused query_key_value has Megatron's own layout: q, k, v by head."""

    NORM = "input_layernorm.weight"
    BUFFERS = FAMILY.buffers
    CONFIG_MAPPING = (
        ("num_hidden_layers", "num_layers"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "ffn_hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "seq_length"),
        ("layer_norm_eps", "layernorm_epsilon"),
        ("initializer_range", "init_method_std"),
        ("attention_dropout", "attention_dropout"),
        ("hidden_dropout", "hidden_dropout"),
        ("tie_word_embeddings", "share_embeddings_and_output_weights"),
        ("use_parallel_residual", "use_parallel_residual"),
    )

    def provider_bridge(self, hf_pretrained: "PreTrainedCausalLM") -> GPTNeoXModelProvider:
        """Convert the config."""
        rope = hf_pretrained.config.rope_parameters
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization = "LayerNorm"
        provider.rotary_base = rope["rope_theta"]
        provider.rotary_percent = rope["partial_rotary_factor"]
        provider.add_bias_linear = True
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: GPTNeoXModelProvider) -> dict[str, Any]:
        """Convert the provider back into the fields of a config.json."""
        config = super().megatron_to_hf_config(provider)
        return config | {"rotary_pct": provider.rotary_percent, "rotary_emb_base": provider.rotary_base}

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Names in Megatron (those of fused norms; the registry adds the separate ones) <-> names in Hugging Face."""
        layer, here = "decoder.layers.*.", "gpt_neox.layers.*."
        modules = {
            f"{layer}self_attention.linear_qkv.layer_norm_": f"{here}input_layernorm.",
            f"{layer}self_attention.linear_qkv.": f"{here}attention.query_key_value.",
            f"{layer}self_attention.linear_proj.": f"{here}attention.dense.",
            f"{layer}mlp.linear_fc1.layer_norm_": f"{here}post_attention_layernorm.",
            f"{layer}mlp.linear_fc1.": f"{here}mlp.dense_h_to_4h.",
            f"{layer}mlp.linear_fc2.": f"{here}mlp.dense_4h_to_h.",
            "decoder.final_layernorm.": "gpt_neox.final_layer_norm.",
        }
        return MegatronMappingRegistry(
            AutoMapping("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight"),
            AutoMapping("output_layer.weight", "embed_out.weight"),
            *(AutoMapping(f"{megatron}weight", f"{hf}weight") for megatron, hf in modules.items()),
            *(AutoMapping(f"{megatron}bias", f"{hf}bias") for megatron, hf in modules.items()),
        )
