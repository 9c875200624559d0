"""GPT-2: learned positions, tied embeddings, linear weights stored transposed (Conv1D)."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.models.conversion import auto_bridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, ReplicatedMapping
from megatron.bridge.models.conversion.peft_bridge import AdapterWeight
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import GPT2LMHeadModel

from posttrain.errors import UserError
from posttrain.models.bridges.buffers import KeepsBuffers
from posttrain.models.bridges.whole_config import WholeConfig
from posttrain.models.families.gpt2 import FAMILY

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
    from megatron.core.transformer.module import MegatronModule

# AutoBridge takes an architecture for a causal model by the end of its name; GPT-2's is older than that convention.
if GPT2LMHeadModel.__name__ not in auto_bridge.SUPPORTED_HF_ARCHITECTURES:
    auto_bridge.SUPPORTED_HF_ARCHITECTURES += (GPT2LMHeadModel.__name__,)


@dataclass
class GPT2ModelProvider(GPTModelProvider):
    """GPT-2, whose position embedding has its own length whatever the length of the batches.

    Attributes:
        n_positions: rows of the position embedding: the longest sequence, tokens.
    """

    seq_length: int = 1024
    n_positions: int = 1024

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build the model.

        Raises:
            UserError: a sequence may be longer than there are positions.
        """
        wanted = self.seq_length
        if wanted > self.n_positions:
            raise UserError(
                f"trainer.seq_length={wanted}: this model has {self.n_positions} learned positions; lower it"
            )
        self.seq_length = self.n_positions  # what core sizes the position embedding by
        try:
            return super().provide(pre_process, post_process, vp_stage)
        finally:
            self.seq_length = wanted


def side_by_side(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q, k and v by head, as Megatron has them [heads * 3 * d, ...] -> all of q, all of k, all of v."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


class QKVMapping(AutoMapping):
    """Conv1D's [hidden, 3 * hidden], q, k and v side by side, or its bias <-> Megatron's rows.

    Upstream's ConcatenatedQKVMapping sends the whole configuration along a pipeline, with all that hangs on it.

    Args:
        heads: attention heads.
    """

    def __init__(self, megatron_param: str, hf_param: str, heads: int) -> None:
        super().__init__(megatron_param, hf_param)
        self.heads = heads

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module) -> torch.Tensor:
        """Transpose, order by head, distribute."""
        rows = hf_weights.T if hf_weights.dim() == 2 else hf_weights
        by_head = rows.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return super().hf_to_megatron(by_head.contiguous(), megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """Gather, order by kind, transpose."""
        converted = {}
        for name, weight in super().megatron_to_hf(megatron_weights, megatron_module).items():
            rows = side_by_side(weight, self.heads)
            if rows.dim() == 2:
                rows = rows.T
            converted[name] = rows.contiguous()
        return converted

    def resolve(self, captures: tuple[str, ...]) -> "QKVMapping":
        """Return the mapping of one layer."""
        megatron, hf = self._resolve_names(captures)
        return type(self)(megatron, hf, self.heads)


@MegatronModelBridge.register_bridge(
    source=GPT2LMHeadModel, target=GPTModel, provider=GPT2ModelProvider, model_type="gpt2"
)
class GPT2Bridge(KeepsBuffers, WholeConfig, MegatronModelBridge):
    """GPT2LMHeadModel <-> GPTModel."""

    NORM = "ln_1.weight"
    BUFFERS = FAMILY.buffers
    CONFIG_MAPPING = (
        ("n_layer", "num_layers"),
        ("n_embd", "hidden_size"),
        ("n_inner", "ffn_hidden_size"),
        ("n_head", "num_attention_heads"),
        ("vocab_size", "vocab_size"),
        ("n_positions", "n_positions"),
        ("n_positions", "seq_length"),
        ("layer_norm_epsilon", "layernorm_epsilon"),
        ("initializer_range", "init_method_std"),
        ("resid_pdrop", "hidden_dropout"),
        ("attn_pdrop", "attention_dropout"),
        ("tie_word_embeddings", "share_embeddings_and_output_weights"),
    )

    def provider_bridge(self, hf_pretrained: "PreTrainedCausalLM") -> GPT2ModelProvider:
        """Convert the config."""
        provider = super().provider_bridge(hf_pretrained)
        provider.position_embedding_type = "learned_absolute"
        provider.normalization = "LayerNorm"
        provider.add_bias_linear = True
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: GPT2ModelProvider) -> dict[str, Any]:
        """Convert the provider back into the fields of a config.json."""
        config = super().megatron_to_hf_config(provider)
        config.pop("hidden_act", None)
        return config | {"activation_function": "gelu_new", "embd_pdrop": provider.hidden_dropout}

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Names in Megatron (those of fused norms; the registry adds the separate ones) <-> names in Hugging Face."""
        root = self._root()
        heads = getattr(self.hf_config, "n_head", 0)  # 0 where only the names are asked for
        layer, here = "decoder.layers.*.", f"{root}h.*."
        plain = {
            "embedding.word_embeddings.weight": f"{root}wte.weight",
            "output_layer.weight": "lm_head.weight",  # where it isn't the embedding
            "decoder.final_layernorm.weight": f"{root}ln_f.weight",
            "decoder.final_layernorm.bias": f"{root}ln_f.bias",
            f"{layer}self_attention.linear_qkv.layer_norm_weight": f"{here}ln_1.weight",
            f"{layer}self_attention.linear_qkv.layer_norm_bias": f"{here}ln_1.bias",
            f"{layer}self_attention.linear_proj.bias": f"{here}attn.c_proj.bias",
            f"{layer}mlp.linear_fc1.layer_norm_weight": f"{here}ln_2.weight",
            f"{layer}mlp.linear_fc1.layer_norm_bias": f"{here}ln_2.bias",
            f"{layer}mlp.linear_fc1.bias": f"{here}mlp.c_fc.bias",
            f"{layer}mlp.linear_fc2.bias": f"{here}mlp.c_proj.bias",
        }
        transposed = {
            f"{layer}self_attention.linear_proj.weight": f"{here}attn.c_proj.weight",
            f"{layer}mlp.linear_fc1.weight": f"{here}mlp.c_fc.weight",
            f"{layer}mlp.linear_fc2.weight": f"{here}mlp.c_proj.weight",
        }
        qkv = f"{layer}self_attention.linear_qkv."
        return MegatronMappingRegistry(
            ReplicatedMapping("embedding.position_embeddings.weight", f"{root}wpe.weight"),
            QKVMapping(f"{qkv}weight", f"{here}attn.c_attn.weight", heads),
            QKVMapping(f"{qkv}bias", f"{here}attn.c_attn.bias", heads),
            *(AutoMapping(megatron, hf) for megatron, hf in plain.items()),
            *(AutoMapping(megatron, hf, permute_dims=(1, 0)) for megatron, hf in transposed.items()),
        )

    def stream_adapter_weights_megatron_to_hf(
        self, megatron_model: "list[MegatronModule]", *args: object, **kwargs: object
    ) -> Iterator[HFWeightTuple]:
        """As upstream's, with the rows of c_attn's B side by side as Hugging Face has q, k and v."""
        for name, weight in super().stream_adapter_weights_megatron_to_hf(megatron_model, *args, **kwargs):
            if name.endswith("c_attn.lora_B.weight"):
                weight = side_by_side(weight, megatron_model[0].config.num_attention_heads)
            yield HFWeightTuple(name, weight)

    def _merge_lora_adapter_weights(
        self,
        megatron_model: "list[MegatronModule]",
        converted_weights_dict: dict[str, torch.Tensor],
        adapter_weights: list[AdapterWeight],
    ) -> dict[str, torch.Tensor]:
        """As upstream's, on weights turned as a Linear's and back."""
        for name in converted_weights_dict:
            if name.endswith("c_attn.weight"):
                out = adapter_weights[0].linear_out_weight
                out = out._replace(weight=side_by_side(out.weight, megatron_model[0].config.num_attention_heads))
                adapter_weights = [dataclasses.replace(adapter_weights[0], linear_out_weight=out)]
        linear = {name: weight.T for name, weight in converted_weights_dict.items()}
        merged = super()._merge_lora_adapter_weights(megatron_model, linear, adapter_weights)
        return {name: weight.T.contiguous() for name, weight in merged.items()}

    def _root(self) -> str:
        """What the names start with: the hub's first GPT-2 files hold the inner model's names."""
        state = getattr(getattr(self, "hf_pretrained", None), "state", None)
        source = getattr(state, "source", None)
        if source is not None and "wte.weight" in source.get_all_keys():
            return ""
        return "transformer."
