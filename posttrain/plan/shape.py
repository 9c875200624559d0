"""A model's sizes and matrices, from the fields of its config.json: exact, and without building it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.shapes import dimensions


@dataclass(frozen=True)
class Family:
    """What config.json does not say about a model type.

    Attributes:
        gated: the MLP has a gate beside its first matrix.
        qkv_bias, linear_bias: query, key and value, or all linear layers, have a bias.
        norms: per layer; Gemma 2 has one after attention and MLP too.
        norm_bias: LayerNorm rather than RMSNorm.
        qk_norm: queries and keys are normalised.
        tied: the output layer is the embedding, where config.json does not say.
        silu: that gate is SiLU's.
        one_kernel: Megatron-Bridge computes gate and activation in one kernel, which keeps less.
        dropout: of the residual stream, where config.json does not say.
    """

    gated: bool = True
    silu: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    one_kernel: bool = False
    dropout: float = 0.0


CLASSIC = Family(gated=False, silu=False, qkv_bias=True, linear_bias=True, norm_bias=True)
FAMILIES = {
    "llama": Family(one_kernel=True),
    "mistral": Family(),
    "mixtral": Family(),
    "gemma": Family(silu=False, tied=True),
    "gemma2": Family(silu=False, tied=True, norms=4),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "gpt2": Family(**vars(CLASSIC) | {"tied": True, "dropout": 0.1}),
    "gpt_neox": CLASSIC,
}


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
        return max(self.experts, 1) * (self.inputs * self.outputs + (self.outputs if self.bias else 0))


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; features unless said otherwise.

    Attributes:
        query, key: all query heads together, all key heads together.
        ffn: the MLP's inner width, an expert's in a mixture.
        positions: learned ones, 0 with a rotary embedding.
        experts, chosen: per layer, and how many of them a token visits; 0: no mixture.
        softcap: whether output logits are soft-capped.
    """

    model_type: str
    family: Family
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
    dropout: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Read the fields of a config.json.

        Raises:
            UserError: a model type that is not known here, or a size is missing.
        """
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise UserError(f"model: the sizes of model_type {kind!r} are not known; known: {', '.join(FAMILIES)}")
        try:
            sizes = dimensions(config)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model: its config.json lacks a size ({error})") from error
        family = FAMILIES[kind]
        if config.get("attention_bias") and kind == "llama":
            family = Family(**vars(family) | {"qkv_bias": True})
        experts = config.get("num_local_experts") or config.get("num_experts") or 0
        tied = config.get("tie_word_embeddings")
        dropout = next((config[k] for k in ("resid_pdrop", "hidden_dropout") if config.get(k) is not None), None)
        return cls(
            model_type=kind,
            family=family,
            layers=sizes["L"],
            hidden=sizes["H"],
            heads=config.get("num_attention_heads") or config["n_head"],
            query=sizes["A"],
            key=sizes["K"],
            ffn=sizes["E"] if experts else sizes["I"],
            vocab=sizes["V"],
            positions=config["n_positions"] if kind == "gpt2" else 0,
            tied=family.tied if tied is None else bool(tied),
            experts=experts,
            chosen=config.get("num_experts_per_tok") or 0,
            softcap=bool(config.get("final_logit_softcapping")),
            dropout=family.dropout if dropout is None else float(dropout),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four linear layers of a transformer layer."""
        h, f = self.hidden, self.family
        gate = (("linear_fc1_gate", self.ffn), ("linear_fc1_up", self.ffn)) if f.gated else (("linear_fc1", self.ffn),)
        qkv = (("linear_q", self.query), ("linear_k", self.key), ("linear_v", self.key))
        return (
            Linear("linear_qkv", h, self.query + 2 * self.key, qkv, f.qkv_bias),
            Linear("linear_proj", self.query, h, (("linear_proj", h),), f.linear_bias),
            Linear("linear_fc1", h, len(gate) * self.ffn, gate, f.linear_bias, self.experts),
            Linear("linear_fc2", self.ffn, h, (("linear_fc2", h),), f.linear_bias, self.experts),
        )

    @property
    def norm(self) -> int:
        """Parameters of one norm over the residual stream."""
        return self.hidden * (2 if self.family.norm_bias else 1)

    @property
    def layer_others(self) -> int:
        """Parameters of a layer outside its linear layers, which tensor parallelism does not divide."""
        head = self.query // self.heads
        return self.family.norms * self.norm + (2 * head if self.family.qk_norm else 0) + self.experts * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, tied embeddings counted once."""
        layer = sum(linear.weights for linear in self.linears) + self.layer_others
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden + self.positions * self.hidden
        return self.layers * layer + embeddings + self.norm

    @property
    def products(self) -> int:
        """Parameters that a token meets in matrix products, experts by how many it visits; the output layer too."""
        visited = self.chosen or 1
        per_layer = sum(linear.inputs * linear.outputs * (visited if linear.experts else 1) for linear in self.linears)
        return self.layers * per_layer + self.hidden * self.vocab


@dataclass(frozen=True)
class Adapters:
    """LoRA or DoRA on some of the linear layers.

    Attributes:
        kind: "LoRA" or "DoRA".
        rank: of the products.
        sizes: linear layer -> (layers that have it adapted, trained parameters of one adapted layer).
        canonical: one adapter for each of Hugging Face's matrices rather than Megatron's.
    """

    kind: str
    rank: int
    sizes: Mapping[str, tuple[int, int]]
    canonical: bool

    @classmethod
    def of(cls, shape: Shape, kind: str, rank: int, targets: str | Iterable[str], grouped: bool) -> "Adapters":
        """Count them as Megatron-Bridge attaches them.

        Args:
            kind: "LoRA" or "DoRA".
            targets: as `peft.target_modules`.
            grouped: experts are one layer with one adapter for all of them (Transformer Engine), not one each.

        Raises:
            UserError: an unknown name, or no layer has it.
        """
        from posttrain.peft.adapters import resolve

        canonical, names = resolve(targets if isinstance(targets, str) else list(targets))
        sizes = {}
        for linear in shape.linears:
            pieces = linear.parts if canonical else ((linear.name, linear.outputs),)
            adapted, trained = 0, 0
            for layer in range(shape.layers):
                chosen = [size for piece, size in pieces if _named(names, linear, piece, layer)]
                one = sum(rank * (linear.inputs + size) + (size if kind == "DoRA" else 0) for size in chosen)
                adapted += bool(chosen)
                trained = max(trained, one * (1 if grouped else max(linear.experts, 1)))
            if adapted:
                sizes[linear.name] = adapted, trained
        if not sizes:
            raise UserError(f"peft.target_modules={targets}: no layer of this model has such a name")
        return cls(kind, rank, sizes, canonical)

    @property
    def parameters(self) -> int:
        """Trained parameters of the whole model."""
        return sum(layers * size for layers, size in self.sizes.values())


def _named(names: list[str], linear: Linear, piece: str, layer: int) -> bool:
    """Whether one of Megatron-Bridge's patterns means this piece: by its name, or by its path with wildcards."""
    path = f"decoder.layers.{layer}.{linear.path.rpartition('.')[0]}.{piece}"
    return any(
        name == piece or re.fullmatch(name.replace(".", r"\.").replace("*", ".*"), path) is not None for name in names
    )


def config_of(model: Any) -> dict[str, Any]:
    """config.json fields of the config group `model`, from its directory where there is one, else as configured.

    Args:
        model: a posttrain.models.HFModel.

    Raises:
        UserError: neither is at hand.
    """
    from posttrain.models.headers import read_json
    from posttrain.models.hf import DEMO, fetch, plain

    given = plain(model.architecture) if model.architecture is not None else None
    path = Path(model.base)
    if path.is_dir() and not (model.random_init and given):
        return read_json(path / "config.json")
    if given:
        return given
    if model.base.startswith(DEMO):
        raise UserError(f"model.path={model.base}: give model.architecture as well")
    return read_json(fetch(model.base, ["config.json"]) / "config.json")
