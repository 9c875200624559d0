"""Gemma 2: a norm before and after attention and MLP, soft-capped logits, a sliding window on every other layer.

Upstream's bridge needs Transformer Engine, its attention refuses packed sequences, and its output norms are part of
the linear layers, so that a LoRA adapter on them is added after the norm and not, as in Hugging Face, before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.bridge.models.conversion.auto_bridge import transformers
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gemma.gemma2_bridge import Gemma2Bridge
from megatron.bridge.models.gemma.gemma2_provider import Gemma2ModelProvider
from megatron.bridge.models.gpt_provider import default_layer_spec
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from posttrain.models.bridges.whole_config import WholeConfig
from posttrain.models.local_spec import Specification, block, local_layer, uses_te
from posttrain.models.norms import ZeroCenteredRMSNorm
from posttrain.ops.attention import SDPAAttention

type WithBias = tuple[torch.Tensor, torch.Tensor | None]
type Add = Callable[[WithBias, torch.Tensor, float], torch.Tensor]


class PostNormAdd(MegatronModule):
    """Core's bias-dropout-add with a norm in front: residual + dropout(norm(x + bias)).

    Args:
        config: of the model.
        norm: builder of the norm.
    """

    def __init__(self, config: Gemma2ModelProvider, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__(config)
        self.post_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Add:
        """Return the function that core calls with ((x, bias), residual, dropout probability)."""
        add = get_bias_dropout_add(training, fused)

        def normed_add(x_with_bias: WithBias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            x, bias = x_with_bias
            if bias is not None:
                x = x + bias
            return add((self.post_layernorm(x), None), residual, dropout)

        return normed_add


def gemma2_layer_spec(config: "PackedGemma2ModelProvider", vp_stage: int | None = None) -> Specification:
    """The usual layer of this platform, with norms after attention and MLP and an attention that knows soft caps."""
    if uses_te(config):
        layer, norm = default_layer_spec(config), TENorm
    else:
        layer, norm = local_layer(config), ZeroCenteredRMSNorm
    add = ModuleSpec(module=PostNormAdd, params={"config": config, "norm": norm})
    if config.attn_logit_softcapping is not None:  # Transformer Engine has no such attention
        layer.submodules.self_attention.submodules.core_attention = SDPAAttention
    layer.submodules.self_attn_bda = layer.submodules.mlp_bda = add
    return block(config, layer, vp_stage)


@dataclass
class PackedGemma2ModelProvider(Gemma2ModelProvider):
    """Gemma 2 of layers that take packed sequences, with or without Transformer Engine."""

    transformer_layer_spec: ModuleSpec | Callable[..., Specification] = gemma2_layer_spec


# `transformers` as AutoBridge sees it: the key under which upstream has registered its bridge, which this one replaces.
@MegatronModelBridge.register_bridge(
    source=transformers.Gemma2ForCausalLM, target=GPTModel, provider=PackedGemma2ModelProvider, model_type="gemma2"
)
class PackedGemma2Bridge(WholeConfig, Gemma2Bridge):
    """Gemma2ForCausalLM <-> GPTModel."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Upstream's names, with the output norms where they are here."""
        layer, here = "decoder.layers.*.", "model.layers.*."
        ours = [
            AutoMapping(f"{layer}self_attn_bda.post_layernorm.weight", f"{here}post_attention_layernorm.weight"),
            AutoMapping(f"{layer}mlp_bda.post_layernorm.weight", f"{here}post_feedforward_layernorm.weight"),
        ]
        for mapping in super().mapping_registry().get_all_mappings():
            if ".post_layernorm." not in mapping.megatron_param:
                ours.append(mapping)
        return MegatronMappingRegistry(*ours)
