"""A model's sizes and matrices, from the fields of its config.json: exact, and without building it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.families import families, family_of, score_softcap_of, softcap_of
from posttrain.models.families.family import ModelFamily, is_set
from posttrain.models.headers import read_json
from posttrain.models.hf import DEMO, HFModel, fetch, plain
from posttrain.peft.adapters import FUSED, resolve

SILU = ("silu", "swish")  # one activation
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")  # as well
EXACT_GELU = ("gelu", "gelu_python")


@dataclass(frozen=True)
class Linear:
    """A linear layer of every transformer layer, in Megatron's words.

    Attributes:
        name: linear_qkv, linear_proj, linear_fc1 or linear_fc2.
        inputs, outputs: features.
        parts: outputs of the pieces that Hugging Face has as matrices of their own.
        bias: whether it has one.
        experts: how many of it there are in a layer.
    """

    name: str
    inputs: int
    outputs: int
    parts: tuple[tuple[str, int], ...]
    bias: bool = False
    experts: int = 0

    @property
    def path(self) -> str:
        """Its name inside a layer."""
        inside = "self_attention" if self.name in ("linear_qkv", "linear_proj") else "mlp"
        return f"{inside}.experts.{self.name}" if self.experts else f"{inside}.{self.name}"

    @property
    def weights(self) -> int:
        """Parameters of all copies in one layer."""
        one = self.inputs * self.outputs
        if self.bias:
            one += self.outputs
        return max(self.experts, 1) * one


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; features unless said otherwise.

    Attributes:
        query, key: all query heads together, all key heads together.
        ffn: the MLP's inner width, an expert's in a mixture.
        positions: learned ones, 0 with a rotary embedding.
        experts, chosen: per layer, and how many of them a token visits; 0: no mixture.
        softcap: whether output logits are soft-capped.
        score_softcap: what attention scores are squashed to; None: nothing.
        score_dropout: of such attention's probabilities.
        dropout: of the residual stream.
        biases: linear layers that have one.
        parallel_residual: attention and MLP read the same input.
        activation: of the MLP, of its gate where it has one, in Hugging Face's words; None: not known.
    """

    family: ModelFamily
    layers: int
    hidden: int
    heads: int
    query: int
    key: int
    ffn: int
    vocab: int
    positions: int
    tied: bool
    experts: int
    chosen: int
    softcap: bool
    score_softcap: float | None
    score_dropout: float
    dropout: float
    biases: frozenset[str]
    parallel_residual: bool
    activation: str | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Read the fields of a config.json.

        Raises:
            UserError: a model type that is not known here, or a size is missing.
        """
        family = family_of(config)
        if family is None:
            kind = config.get("model_type")
            known = ", ".join(known.model_type for known in families())
            raise UserError(f"model: the sizes of model_type {kind!r} are not known; known: {known}")
        positions = 0
        try:
            sizes = family.dimensions(config)
            if family.fields.learned_positions:
                positions = family.size("learned_positions", config)
        except ValueError as error:
            raise UserError(f"model: its config.json lacks a size ({error})") from error
        dropout = family.value("dropout", config)
        return cls(
            family=family,
            layers=sizes.layers,
            hidden=sizes.hidden,
            heads=sizes.heads,
            query=sizes.query,
            key=sizes.key,
            ffn=sizes.expert_inner if sizes.experts else sizes.inner,
            vocab=sizes.vocabulary,
            positions=positions,
            tied=family.is_tied(config),
            experts=sizes.experts,
            chosen=sizes.chosen,
            softcap=softcap_of(config) is not None,
            score_softcap=score_softcap_of(config),
            score_dropout=float(family.value("score_dropout", config) or 0.0),
            dropout=family.dropout if dropout is None else float(dropout),
            biases=frozenset(name for name in FUSED if family.has_bias(name, config)),
            parallel_residual=is_set(family.parallel_residual, config),
            activation=family.value("activation", config) or family.gate,
        )

    @property
    def head_width(self) -> int:
        """Features of an attention head."""
        return self.query // self.heads

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.key * self.heads // self.query

    @property
    def silu_gate(self) -> bool:
        """Whether the MLP is SwiGLU."""
        return self.family.gate is not None and self.activation in SILU

    @property
    def activation_kernel(self) -> bool:
        """Whether there are kernels for the MLP's activation (posttrain.ops.recomputed_norms.Activation)."""
        return self.activation in (*SILU, *TANH_GELU, *EXACT_GELU)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four linear layers of a transformer layer."""
        h = self.hidden
        fc1: tuple[tuple[str, int], ...] = (("linear_fc1", self.ffn),)
        if self.family.gate:
            fc1 = (("linear_fc1_gate", self.ffn), ("linear_fc1_up", self.ffn))
        qkv = (("linear_q", self.query), ("linear_k", self.key), ("linear_v", self.key))
        return (
            Linear("linear_qkv", h, self.query + 2 * self.key, qkv, "linear_qkv" in self.biases),
            Linear("linear_proj", self.query, h, (("linear_proj", h),), "linear_proj" in self.biases),
            Linear("linear_fc1", h, len(fc1) * self.ffn, fc1, "linear_fc1" in self.biases, self.experts),
            Linear("linear_fc2", self.ffn, h, (("linear_fc2", h),), "linear_fc2" in self.biases, self.experts),
        )

    @property
    def norm(self) -> int:
        """Parameters of one norm over the residual stream."""
        return 2 * self.hidden if self.family.norm_bias else self.hidden

    @property
    def layer_others(self) -> int:
        """Parameters of a layer outside its linear layers, which tensor parallelism does not divide."""
        router = self.experts * self.hidden
        others = self.family.norms * self.norm + router
        if self.family.qk_norm:
            others += 2 * self.head_width
        return others

    @property
    def parameters(self) -> int:
        """All parameters, tied embeddings counted once."""
        layer = sum(linear.weights for linear in self.linears) + self.layer_others
        embeddings = self.vocab + self.positions  # rows
        if not self.tied:
            embeddings += self.vocab
        return self.layers * layer + embeddings * self.hidden + self.norm

    @property
    def products(self) -> int:
        """Parameters that a token meets in matrix products, experts by how many it visits; the output layer too."""
        layer = layer_products(
            hidden=self.hidden,
            query=self.query,
            key=self.key,
            ffn=self.ffn,
            gate=self.family.gate is not None,
            visited=self.chosen or 1,
        )
        return self.layers * layer + self.hidden * self.vocab


def layer_products(*, hidden: int, query: int, key: int, ffn: int, gate: bool, visited: int) -> int:
    """Parameters that a token meets in the matrix products of a layer.

    Args:
        hidden: width of the residual stream.
        query: all query heads together.
        key: all key heads together.
        ffn: the MLP's inner width, an expert's in a mixture.
        gate: whether the MLP has one.
        visited: MLPs that a token passes: experts in a mixture, else 1.
    """
    attention = hidden * (2 * query + 2 * key)
    mlp = hidden * ffn * (3 if gate else 2)
    return attention + visited * mlp


@dataclass(frozen=True)
class Adapters:
    """LoRA or DoRA on some of the linear layers.

    Attributes:
        kind: "LoRA" or "DoRA".
        rank: of the products.
        sizes: linear layer -> (layers that have it adapted, trained parameters of one adapted layer).
        canonical: one adapter for each of Hugging Face's matrices rather than Megatron's.
        grouped: one adapter for all experts of a layer rather than one for each.
    """

    kind: str
    rank: int
    sizes: Mapping[str, tuple[int, int]]
    canonical: bool
    grouped: bool

    @classmethod
    def from_targets(
        cls, shape: Shape, kind: str, rank: int, targets: str | Sequence[str], grouped: bool
    ) -> "Adapters":
        """Count them as Megatron-Bridge attaches them.

        Args:
            shape: of the model.
            kind: "LoRA" or "DoRA".
            rank: of the products.
            targets: as `peft.target_modules`.
            grouped: experts are one layer with one adapter for all of them (Transformer Engine), not one each.

        Raises:
            UserError: an unknown name, or no layer has it.
        """
        canonical, names = resolve(targets)
        sizes = {}
        for linear in shape.linears:
            pieces = linear.parts if canonical else ((linear.name, linear.outputs),)
            copies = 1 if grouped else max(linear.experts, 1)
            adapted = trained = 0
            for layer in range(shape.layers):
                in_layer = 0
                for piece, outputs in pieces:
                    if _is_named(names, linear, piece, layer):
                        in_layer += rank * (linear.inputs + outputs)
                        if kind == "DoRA":
                            in_layer += outputs
                if in_layer:
                    adapted += 1
                    trained = max(trained, copies * in_layer)
            if adapted:
                sizes[linear.name] = adapted, trained
        if not sizes:
            raise UserError(f"peft.target_modules={targets}: no layer of this model has such a name")
        return cls(kind, rank, sizes, canonical, grouped)

    @property
    def parameters(self) -> int:
        """Trained parameters of the whole model."""
        return sum(layers * size for layers, size in self.sizes.values())


def _is_named(names: list[str], linear: Linear, piece: str, layer: int) -> bool:
    """Whether one of Megatron-Bridge's patterns means this piece: by its name, or by its path with wildcards."""
    path = f"decoder.layers.{layer}.{linear.path.rpartition('.')[0]}.{piece}"
    for name in names:
        pattern = name.replace(".", r"\.").replace("*", ".*")
        if name == piece or re.fullmatch(pattern, path):
            return True
    return False


def config_of(model: HFModel) -> dict[str, Any]:
    """config.json fields of the config group `model`, from its directory where there is one, else as configured.

    Raises:
        UserError: neither is at hand.
    """
    path = Path(model.base)
    if path.is_dir() and not (model.random_init and model.architecture):
        return read_json(path / "config.json")
    if model.architecture:
        fields: dict[str, Any] = plain(model.architecture)
        return fields
    if model.base.startswith(DEMO):
        raise UserError(f"model.path={model.base}: give model.architecture as well")
    return read_json(fetch(model.base, ["config.json"]) / "config.json")
