"""What config.json says and upstream's bridges leave out or get wrong, in one place for every family.

Upstream's bridge sees the usual values; the file's own are set on the provider that it returns: the rotary embedding's
frequencies as transformers computes them, windows by layer, biases, activation, dropout, tied or untied output.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from posttrain.models.biased_layers import with_biases
from posttrain.models.bridges.activation_functions import ACTIVATIONS
from posttrain.models.families import family_of
from posttrain.models.families.field_rules import SLIDING

if TYPE_CHECKING:
    # A mixin of upstream's class; at run time it comes after it.
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge as Bridge
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
    from transformers import PretrainedConfig
else:
    Bridge = object

LAYER, HERE = "decoder.layers.*.", "model.layers.*."
# Biases of Llama's layer, and an output matrix of its own, which upstream's bridges of some families have no names for.
OPTIONAL = (
    AutoMapping("output_layer.weight", "lm_head.weight"),
    QKVMapping(
        f"{LAYER}self_attention.linear_qkv.bias",
        q=f"{HERE}self_attn.q_proj.bias",
        k=f"{HERE}self_attn.k_proj.bias",
        v=f"{HERE}self_attn.v_proj.bias",
    ),
    AutoMapping(f"{LAYER}self_attention.linear_proj.bias", f"{HERE}self_attn.o_proj.bias"),
    GatedMLPMapping(f"{LAYER}mlp.linear_fc1.bias", gate=f"{HERE}mlp.gate_proj.bias", up=f"{HERE}mlp.up_proj.bias"),
    AutoMapping(f"{LAYER}mlp.linear_fc2.bias", f"{HERE}mlp.down_proj.bias"),
)


class WholeConfig(Bridge):
    """Mixin in front of upstream's bridge: every field that the family's rules accept is honoured."""

    def provider_bridge(self, hf_pretrained: "PreTrainedCausalLM") -> GPTModelProvider:
        """Convert the config."""
        config = hf_pretrained.config
        provider = super().provider_bridge(SimpleNamespace(config=usual(config)))
        set_activation(provider, config)
        set_rotary_embedding(provider, config)
        set_windows(provider, config)
        provider.share_embeddings_and_output_weights = config.tie_word_embeddings
        if hasattr(config, "attention_dropout"):
            provider.attention_dropout = config.attention_dropout or 0.0
        attention, mlp = bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))
        if (attention or mlp) and not provider.add_bias_linear:
            provider.transformer_layer_spec = partial(
                with_biases, provider.transformer_layer_spec, attention=attention, mlp=mlp
            )
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The family's names, and those of tensors that only some of its models have."""
        mappings = list(super().mapping_registry().get_all_mappings())
        named = {mapping.megatron_param for mapping in mappings}
        return MegatronMappingRegistry(
            *mappings, *(mapping for mapping in OPTIONAL if mapping.megatron_param not in named)
        )


def usual(config: "PretrainedConfig") -> "PretrainedConfig":
    """A copy without what upstream's bridges would stumble over; it is set afterwards."""
    plain = copy.deepcopy(config)
    for name in ("hidden_act", "hidden_activation"):
        if hasattr(plain, name):
            setattr(plain, name, "gelu")
    for name in ("attention_bias", "mlp_bias"):
        if hasattr(plain, name):
            setattr(plain, name, False)
    if getattr(plain, "sliding_window", 0) is None:
        plain.sliding_window = 1
    rope = getattr(plain, "rope_parameters", None)
    if rope:
        kept = ("rope_theta", "partial_rotary_factor")
        plain.rope_parameters = {"rope_type": "default", **{key: rope[key] for key in kept if key in rope}}
    return plain


def set_activation(provider: GPTModelProvider, config: "PretrainedConfig") -> None:
    """The MLP's activation. Megatron's fused ones are SiLU's, and for GELU an approximation whatever is asked for."""
    fields = config.to_dict()
    family = family_of(fields)
    activation = family.value("activation", fields) if family is not None else config.hidden_act
    provider.activation_func = ACTIVATIONS[activation]
    if provider.activation_func is not F.silu:
        provider.bias_activation_fusion = False


def set_windows(provider: GPTModelProvider, config: "PretrainedConfig") -> None:
    """Which layers see a window of the sequence alone; a list of types by layer, where the family has one, says it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    provider.window_size = None
    provider.window_attn_skip_freq = None
    if window is None or (types is not None and SLIDING not in types):
        return
    provider.window_size = (window - 1, 0)
    if types is not None:
        provider.window_attn_skip_freq = [int(kind == SLIDING) for kind in types]


def set_rotary_embedding(provider: GPTModelProvider, config: "PretrainedConfig") -> None:
    """The inverse frequencies of a scaled rotary embedding, and the scale of the softmax.

    Some kinds multiply queries and keys by a factor. In the softmax's scale it is the same product, and fused kernels
    know nothing of a factor elsewhere.
    """
    factor = 1.0
    rope = getattr(config, "rope_parameters", None)
    if rope and rope["rope_type"] != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        provider.register_pre_wrap_hook(place_frequencies(frequencies))
    head = getattr(config, "query_pre_attn_scalar", None)
    if factor != 1.0 or head is not None:
        head = head or provider.kv_channels or provider.hidden_size // provider.num_attention_heads
        provider.softmax_scale = head**-0.5 * factor**2


def place_frequencies(frequencies: torch.Tensor) -> Callable[[list[torch.nn.Module]], list[torch.nn.Module]]:
    """A hook that gives them, float32[rotated features / 2], to the rotary embedding of a built model's parts."""

    def place(parts: list[torch.nn.Module]) -> list[torch.nn.Module]:
        for part in parts:
            rotary = cast(RotaryEmbedding, part.rotary_pos_emb)
            rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
        return parts

    return place
