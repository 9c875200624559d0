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

FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# Hugging Face's name of a projection -> the component that Megatron-Bridge's canonical LoRA knows.
CANONICAL = {
    "q_proj": "linear_q",
    "k_proj": "linear_k",
    "v_proj": "linear_v",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1_gate",
    "up_proj": "linear_fc1_up",
    "down_proj": "linear_fc2",
}
# Families whose own names are of the fused matrices: GPT-2, GPT-NeoX.
HF_FUSED = {
    "c_attn": "linear_qkv",
    "c_fc": "linear_fc1",
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}


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
        recompute: with `fused`, compute norms and SwiGLU again in the backward pass instead of keeping their outputs.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    rslora: bool = False
    lora_plus_ratio: float | None = None
    fused: bool = True
    recompute: bool = True

    @property
    def effective_alpha(self) -> float:
        """The alpha that gives this adapter's scale when divided by rank."""
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        return alpha * math.sqrt(self.rank) if self.rslora else alpha

    @property
    def every_layer_fused(self) -> bool:
        """Whether each linear layer of a dense model on undivided matrices is one operation with its adapter."""
        canonical, names = resolve(self.target_modules)
        return self.fused and not self.dropout and not canonical and set(FUSED) <= set(names)

    def build(self) -> Any:
        """Return Megatron-Bridge's LoRA, or CanonicalLoRA for Hugging Face names."""
        canonical, names = resolve(self.target_modules)
        settings = {"dim": self.rank, "alpha": self.effective_alpha, "dropout": self.dropout}
        from posttrain.peft.seeded import SeededCanonicalLoRA, SeededLoRA

        kind = SeededCanonicalLoRA if canonical else SeededLoRA
        built = kind(target_modules=names, lora_A_init_method="kaiming", **settings)
        built.fused, built.recompute = self.fused, self.recompute
        return built


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
            target_modules=names, dim=self.rank, alpha=self.effective_alpha, dropout=self.dropout,
            lora_A_init_method="kaiming",
        )  # fmt: skip


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
    fused, parts = [], []
    for name in names:
        head, _, last = name.rpartition(".")
        prefix = f"{head}." if head else ""
        if last in CANONICAL:
            parts.append(prefix + CANONICAL[last])
        elif last in CANONICAL.values() and last not in FUSED:
            parts.append(name)
        elif last in FUSED or last in HF_FUSED:
            fused.append(prefix + HF_FUSED.get(last, last))
        else:
            known = ", ".join(["all-linear", *CANONICAL, *FUSED])
            raise UserError(f"peft.target_modules: unknown module {name!r}; known: {known}")
    split = [name for name in fused if name.endswith(("linear_qkv", "linear_fc1"))]
    if parts and split:
        raise UserError(
            f"peft.target_modules: {split[0]} is a whole matrix, {names[0]} a part of one; use Hugging Face's names "
            "(q_proj, k_proj, v_proj, gate_proj, up_proj) or Megatron's, not both"
        )
    return bool(parts), fused + parts
