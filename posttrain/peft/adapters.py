"""The objects of the config group `peft`.

Hugging Face names a projection by itself (q_proj), Megatron has some of them in one matrix (linear_qkv). An adapter on
the whole matrix shares A among its parts and is the fastest; one per part is what Hugging Face's PEFT trains. The names
given decide: Megatron's (and `all-linear`) train the former, Hugging Face's the latter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError
from posttrain.models.families import families
from posttrain.models.families.family import PARTS

FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
DIVIDED = ("linear_qkv", "linear_fc1")  # those of which a part can be adapted by itself


@dataclass
class LoRA:
    """LoRA (arXiv:2106.09685).

    Attributes:
        rank: width of the low-rank products.
        alpha: the product is multiplied by alpha / rank; None: 2 x rank.
        dropout: on the adapter's input.
        target_modules: `all-linear` or names; see the module's docstring.
        rslora: multiply by alpha / sqrt(rank) instead (arXiv:2312.03732).
        lora_plus_ratio: learning rate of B over that of A (arXiv:2402.12354); None: the same.
        fused: compute a layer and its adapter as one operation where possible.
        recompute_norms: with `fused`, compute norms and SwiGLU again in the backward pass; their outputs are not kept.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    rslora: bool = False
    lora_plus_ratio: float | None = None
    fused: bool = True
    recompute_norms: bool = True

    @property
    def effective_alpha(self) -> float:
        """The alpha that gives this adapter's scale when divided by rank."""
        alpha = 2.0 * self.rank
        if self.alpha is not None:
            alpha = float(self.alpha)
        if self.rslora:
            alpha *= math.sqrt(self.rank)
        return alpha

    @property
    def every_layer_fused(self) -> bool:
        """Whether each linear layer of a dense model on undivided matrices is one operation with its adapter."""
        canonical, names = resolve(self.target_modules)
        return self.fused and not self.dropout and not canonical and set(FUSED) <= set(names)

    def build(self) -> Any:
        """Return Megatron-Bridge's LoRA, or CanonicalLoRA for Hugging Face names."""
        from posttrain.peft.seeded import SeededCanonicalLoRA, SeededLoRA

        canonical, names = resolve(self.target_modules)
        adapter = (SeededCanonicalLoRA if canonical else SeededLoRA)(
            target_modules=names,
            dim=self.rank,
            alpha=self.effective_alpha,
            dropout=self.dropout,
            lora_A_init_method="kaiming",
        )
        adapter.fused = self.fused
        adapter.recompute_norms = self.recompute_norms
        return adapter


@dataclass
class DoRA(LoRA):
    """DoRA (arXiv:2402.09353): LoRA on the direction, the magnitude trained apart. Whole matrices only."""

    every_layer_fused = False

    def build(self) -> Any:
        """Return Megatron-Bridge's DoRA."""
        canonical, names = resolve(self.target_modules)
        if canonical:
            raise UserError(
                f"peft.target_modules={list(self.target_modules)}: DoRA works on Megatron's whole matrices; "
                f"use all-linear or some of {', '.join(FUSED)}"
            )
        from posttrain.peft.seeded import SeededDoRA

        return SeededDoRA(
            target_modules=names,
            dim=self.rank,
            alpha=self.effective_alpha,
            dropout=self.dropout,
            lora_A_init_method="kaiming",
        )


def hf_names() -> tuple[dict[str, str], dict[str, str]]:
    """Hugging Face's names of projections in any family, with the component that each is in Megatron.

    Returns:
        The names of families that have query, key and value apart, for which Megatron-Bridge has canonical LoRA, and
        the names of the others.
    """
    parts: dict[str, str] = {}
    whole: dict[str, str] = {}
    for family in families():
        for name, component in family.projections.items():
            if family.separate_qkv and component not in DIVIDED:
                parts.setdefault(name, component)
            else:
                whole.setdefault(name, component)
    return parts, whole


def resolve(target_modules: str | Sequence[str]) -> tuple[bool, list[str]]:
    """Turn the user's names into Megatron-Bridge's.

    Returns:
        Whether canonical LoRA is needed (a part of a fused matrix is named), and the names for it.

    Raises:
        UserError: an unknown name, or parts of a matrix together with whole matrices.
    """
    if target_modules == "all-linear":
        return False, list(FUSED)
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not names:
        raise UserError("peft.target_modules: names no module; use all-linear or a list such as [q_proj,v_proj]")
    names_of_parts, names_of_whole = hf_names()
    fused, parts = [], []
    for name in names:
        head, _, last = name.rpartition(".")
        prefix = f"{head}." if head else ""
        if last in names_of_whole:
            fused.append(prefix + names_of_whole[last])
        elif last in FUSED:
            fused.append(name)
        elif last in names_of_parts:
            parts.append(prefix + names_of_parts[last])
        elif last in PARTS:
            parts.append(name)
        else:
            known = ", ".join(["all-linear", *names_of_parts, *FUSED])
            raise UserError(f"peft.target_modules: unknown module {name!r}; known: {known}")
    split = [name for name in fused if name.endswith(DIVIDED)]
    if parts and split:
        raise UserError(
            f"peft.target_modules: {split[0]} is a whole matrix, {names[0]} a part of one; use Hugging Face's names "
            "(q_proj, k_proj, v_proj, gate_proj, up_proj) or Megatron's, not both"
        )
    return bool(parts), fused + parts
