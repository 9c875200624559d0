"""What is known of a model family: one record, which checks, plan, training and export all read.

Imports nothing heavy: checks and plans read records before torch is loaded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from posttrain.models.families.field_rules import (
    Constraint,
    Rule,
    padding_is_in_the_vocabulary,
    problem_in,
    rope_is_said_once,
    rope_limit_is_said,
    rope_parameters_of,
    types_for_each_layer,
    windows_have_a_size,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Part of a matrix that Megatron has whole -> that matrix.
PARTS = {
    "linear_q": "linear_qkv",
    "linear_k": "linear_qkv",
    "linear_v": "linear_qkv",
    "linear_fc1_gate": "linear_fc1",
    "linear_fc1_up": "linear_fc1",
}


@dataclass(frozen=True)
class Flag:
    """A property that depends on the model's config.json.

    Attributes:
        field: of the config.json.
        default: where that field is missing.
    """

    field: str
    default: bool = False


# What fields may say together, of every family that has them.
CONSTRAINTS = (
    rope_is_said_once,
    rope_limit_is_said,
    types_for_each_layer,
    windows_have_a_size,
    padding_is_in_the_vocabulary,
)

ATTENTION_BIAS = Flag("attention_bias")  # of query, key, value and output; most families have it, few models set it


def is_set(option: bool | Flag, config: Mapping[str, Any]) -> bool:
    """Whether a property holds for a model.

    Args:
        config: fields of its config.json.
    """
    if isinstance(option, bool):
        return option
    value = config.get(option.field)
    if value is None:
        return option.default
    return bool(value)


@dataclass(frozen=True)
class Matrix:
    """A matrix of a Hugging Face model: an embedding, or the weight of a linear layer.

    Attributes:
        name: end of its module's name; `*` stands for a number.
        shape: of its weight, names of `Dimensions`; a linear layer's is (outputs, inputs) unless the family's are
            transposed.
        component: what Megatron calls the linear layer or, where it has several of them as one matrix, this part of
            it (a key of PARTS); None: no layer that LoRA adapts.
        bias: whether the layer has one.
    """

    name: str
    shape: tuple[str, str]
    component: str | None = None
    bias: bool | Flag = False

    @property
    def of_expert(self) -> bool:
        """Whether each expert of a mixture has one."""
        return "experts.*." in self.name

    @property
    def whole(self) -> str | None:
        """Megatron's matrix that it is or belongs to."""
        return PARTS.get(self.component or "", self.component)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds its weight's name."""
        return re.compile(r"(^|\.)" + re.escape(f"{self.name}.weight").replace(r"\*", r"\d+") + "$")


EMBEDDING = Matrix("embed_tokens", ("vocabulary", "hidden"))
OUTPUT = Matrix("lm_head", ("vocabulary", "hidden"))


def attention(qkv_bias: bool | Flag = False, output_bias: bool | Flag = False) -> tuple[Matrix, ...]:
    """Separate projections for query, key, value and output, as most families have them."""
    return (
        Matrix("self_attn.q_proj", ("query", "hidden"), "linear_q", qkv_bias),
        Matrix("self_attn.k_proj", ("key", "hidden"), "linear_k", qkv_bias),
        Matrix("self_attn.v_proj", ("key", "hidden"), "linear_v", qkv_bias),
        Matrix("self_attn.o_proj", ("hidden", "query"), "linear_proj", output_bias),
    )


def gated_mlp(bias: bool | Flag = False) -> tuple[Matrix, ...]:
    """An MLP with a gate beside its first matrix, as most families have it."""
    return (
        Matrix("mlp.gate_proj", ("inner", "hidden"), "linear_fc1_gate", bias),
        Matrix("mlp.up_proj", ("inner", "hidden"), "linear_fc1_up", bias),
        Matrix("mlp.down_proj", ("hidden", "inner"), "linear_fc2", bias),
    )


@dataclass(frozen=True, kw_only=True)
class ConfigFields:
    """Names of the fields of a config.json; of several names the first that has a value counts.

    Attributes:
        hidden: width of the residual stream.
        inner: width of the MLP; without a value four times `hidden`.
        expert_inner: width of an expert; without a value `inner`.
        layers, heads: their numbers.
        groups: number of key and value heads; without a value `heads`.
        head: width of a head; without a value `hidden` / `heads`.
        vocabulary: rows of the embedding.
        positions: longest sequence that it was made for.
        learned_positions: rows of a position embedding; none with a rotary embedding.
        experts, chosen: experts of a layer, and how many of them a token visits.
        dropout: of the residual stream.
        activation: of the MLP; without a value `ModelFamily.gate`, where there is a gate.
        softcap: what output logits are squashed to.
        score_softcap: what attention scores are squashed to.
        score_dropout: of such attention's probabilities.
    """

    hidden: tuple[str, ...] = ("hidden_size",)
    inner: tuple[str, ...] = ("intermediate_size",)
    expert_inner: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("num_hidden_layers",)
    heads: tuple[str, ...] = ("num_attention_heads",)
    groups: tuple[str, ...] = ("num_key_value_heads",)
    head: tuple[str, ...] = ("head_dim",)
    vocabulary: tuple[str, ...] = ("vocab_size",)
    positions: tuple[str, ...] = ("max_position_embeddings",)
    learned_positions: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    dropout: tuple[str, ...] = ()
    activation: tuple[str, ...] = ("hidden_act",)
    softcap: tuple[str, ...] = ()
    score_softcap: tuple[str, ...] = ()
    score_dropout: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model; features unless said otherwise.

    Attributes:
        hidden: width of the residual stream.
        inner, expert_inner: width of the MLP, and of one expert.
        query, key: all query heads together, all key heads together.
        vocabulary: rows of the embedding.
        layers, heads, groups: their numbers; a group shares a key and a value.
        experts, chosen: per layer, and how many of them a token visits; 0: no mixture.
        positions: longest sequence that it was made for, tokens; None: not said.
    """

    hidden: int
    inner: int
    expert_inner: int
    query: int
    key: int
    vocabulary: int
    layers: int
    heads: int
    groups: int
    experts: int
    chosen: int
    positions: int | None

    @property
    def qkv(self) -> int:
        """Query, key and value of all heads together."""
        return self.query + 2 * self.key


def no_legacy_fields(config: "PretrainedConfig") -> dict[str, Any]:
    """Nothing: both versions of transformers have the same names."""
    return {}


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Models that transformers builds with one class.

    Attributes:
        model_type: transformers' name of the family, of a config.json.
        architectures: names of its classes of causal language models.
        matrices: all of them.
        fields: what config.json calls its sizes.
        defaults: by field of sizes and soft caps, what transformers takes where a config.json leaves it out, unless
            that follows from other fields.
        rules: what each field of config.json may say; empty: not known, and nothing is refused.
        constraints: what fields may say together; each returns what is wrong, None: nothing.
        bridge: module that registers its bridge to Megatron; None: Megatron-Bridge's own is right.
        layer_list: what the list of its layers is called in tensors' names.
        embedding: end of the name of the embedding's tensor.
        output_layer: end of the name of the output layer's tensor, which files leave out where it is the embedding.
        tied: the output layer is the embedding, where config.json does not say.
        transposed: weights of linear layers are [in, out].
        buffers: ends of the names of tensors that some published checkpoints hold and that are no weights.
        gate: activation of the MLP's gate; None: the MLP has no gate.
        fused_gate: Megatron-Bridge computes gate and activation in one kernel, which keeps less.
        norms: per layer, those of queries and keys not counted.
        norm_bias: LayerNorm rather than RMSNorm.
        qk_norm: queries and keys are normalised.
        parallel_residual: attention and MLP read the same input.
        dropout: of the residual stream, where config.json does not say.
        no_cuda_graph: why a step is not captured in a CUDA graph unless that is asked for; None: it is.
        legacy_fields: fields to add to a written config.json that transformers 4 has other names for.
    """

    model_type: str
    architectures: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    fields: ConfigFields = ConfigFields()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    bridge: str | None = None
    layer_list: str = "layers"
    embedding: str = "embed_tokens.weight"
    output_layer: str = "lm_head.weight"
    tied: bool = False
    transposed: bool = False
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    gate: Literal["silu", "gelu_pytorch_tanh"] | None = "silu"
    fused_gate: bool = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool | Flag = False
    dropout: float = 0.0
    no_cuda_graph: str | None = None
    legacy_fields: Callable[["PretrainedConfig"], dict[str, Any]] = no_legacy_fields

    def given(self, size: str, config: Mapping[str, Any]) -> Any:
        """What a config.json says of one size.

        Args:
            size: an attribute of ConfigFields.
            config: fields of the config.json.

        Returns:
            As it stands there, whatever that is; None where it says nothing.
        """
        for name in getattr(self.fields, size):
            value = config.get(name)
            if value is not None:
                return value
        return None

    def value(self, size: str, config: Mapping[str, Any]) -> Any:
        """As `given`, but what transformers takes where the field is left out."""
        names = getattr(self.fields, size)
        if any(name in config for name in names):
            return self.given(size, config)
        return next((self.defaults[name] for name in names if name in self.defaults), None)

    def size(self, size: str, config: Mapping[str, Any], default: int | None = None) -> int:
        """As `value`, for what has to be a positive whole number.

        Raises:
            ValueError: it is not, or it is missing and there is no default.
        """
        value = self.value(size, config)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{getattr(self.fields, size)[0]} is missing")
        if type(value) is not int or value < 1:
            raise ValueError(f"{value!r} is not a size: a positive whole number is required")
        return value

    def problem(self, config: Mapping[str, Any]) -> str | None:
        """The first thing in a config.json that can't be honoured, as "field=value: ..."; None: nothing.

        Args:
            config: fields of the config.json.
        """
        if not self.rules:
            return None
        problem = problem_in(config, self.rules)
        for constraint in (*CONSTRAINTS, *self.constraints):
            problem = problem or constraint(config)
        return problem or self._problem_of_sizes(config)

    def _problem_of_sizes(self, config: Mapping[str, Any]) -> str | None:
        """The first size that does not go together with another, in the words of `problem`."""
        try:
            sizes = self.dimensions(config)
        except ValueError:
            return None  # one is missing, which is said where the model is read
        if sizes.heads % sizes.groups:
            return f"{self.fields.groups[0]}={sizes.groups}: must divide the {sizes.heads} attention heads"
        if sizes.chosen > sizes.experts:
            return f"{self.fields.chosen[0]}={sizes.chosen}: there are {sizes.experts} experts"
        head = sizes.query // sizes.heads
        if not self.fields.learned_positions and head % 2:
            return f"head_dim={head}: must be even; a rotary embedding turns pairs of features"
        rope = rope_parameters_of(config)
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if isinstance(factors, list | tuple) and 2 * len(factors) != head:
                return f"{name}: has {len(factors)} factors for heads of {head} features; one for each pair is needed"
        return None

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """All sizes of a model.

        Args:
            config: fields of its config.json.

        Raises:
            ValueError: one is missing or no size.
        """
        hidden = self.size("hidden", config)
        heads = self.size("heads", config)
        groups = self.size("groups", config, heads)
        head = self.size("head", config, hidden // heads)
        inner = self.size("inner", config, 4 * hidden)

        def size_if_given(size: str) -> int | None:
            return self.size(size, config) if self.value(size, config) else None

        return Dimensions(
            hidden=hidden,
            inner=inner,
            expert_inner=self.size("expert_inner", config, inner),
            query=heads * head,
            key=groups * head,
            vocabulary=self.size("vocabulary", config),
            layers=self.size("layers", config),
            heads=heads,
            groups=groups,
            experts=size_if_given("experts") or 0,
            chosen=size_if_given("chosen") or 0,
            positions=size_if_given("positions"),
        )

    def has_bias(self, whole: str, config: Mapping[str, Any]) -> bool:
        """Whether a linear layer of Megatron's has a bias in a model with this config.json."""
        return any(is_set(matrix.bias, config) for matrix in self.matrices if matrix.whole == whole)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output layer of a model with this config.json is its embedding."""
        return is_set(Flag("tie_word_embeddings", self.tied), config)

    def shape_of(self, tensor: str, sizes: Dimensions) -> tuple[int, ...] | None:
        """The shape that a tensor of this name has in a file; None where that isn't known."""
        matrix = self.matrix_of(tensor)
        if matrix is None:
            return None
        return tuple(getattr(sizes, size) for size in matrix.shape)

    def matrix_of(self, tensor: str) -> Matrix | None:
        """The matrix whose weight has a name of this end; None where it isn't known."""
        return next((matrix for matrix in self.matrices if matrix.pattern.search(tensor)), None)

    def layer_of(self, tensor: str) -> tuple[int, str] | None:
        """(number of its layer, name inside it) of a tensor; None where it is outside the layers."""
        match = self._in_layer.match(tensor)
        if match is None:
            return None
        return int(match[2]), match[3]

    @cached_property
    def _in_layer(self) -> re.Pattern[str]:
        return re.compile(rf"^(.*?\b{re.escape(self.layer_list)})\.(\d+)\.(.+)$")

    def is_buffer(self, tensor: str) -> bool:
        """Whether a tensor of this name is one of `buffers`."""
        return f".{tensor}".endswith(tuple(f".{buffer}" for buffer in self.buffers))

    @property
    def separate_qkv(self) -> bool:
        """Whether query, key and value are matrices of their own."""
        return any(matrix.component == "linear_q" for matrix in self.matrices)

    @property
    def adapted(self) -> tuple[Matrix, ...]:
        """The matrices that LoRA can name; experts go by Megatron's names."""
        return tuple(matrix for matrix in self.matrices if matrix.component and not matrix.of_expert)

    @cached_property
    def projections(self) -> dict[str, str]:
        """Last part of a linear layer's name -> its component; without those that two of its layers share."""
        components: dict[str, str] = {}
        shared = set()
        for matrix in self.adapted:
            name = matrix.name.rpartition(".")[2]
            if name in components:
                shared.add(name)
            components[name] = matrix.component or ""
        return {name: component for name, component in components.items() if name not in shared}
