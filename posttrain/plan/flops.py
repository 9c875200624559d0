"""Floating-point operations of a training step, for MFU.

A matrix product of a weight costs 2 operations per weight and token forward, 2 for the gradient of
its input, 2 for the weight's own; a frozen weight does not pay the last. Attention over a causal
sequence of length s costs 2 s^2 d forward (QK^T and PV, half of each masked away), twice that
backward. Recomputation is not counted: it is work, not progress (PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, appendix B).
"""

from dataclasses import dataclass

from posttrain.spec.shape import Shape


@dataclass(frozen=True)
class ModelFlops:
    """A model's operations.

    Attributes:
        weights: parameters in matrix products, over all model-parallel processes.
        head: of these the output layer's.
        frozen: whether the base weights are frozen.
        attention: layers x heads x head size.
        peak: operations per second of all GPUs together, None where unknown.
    """

    weights: int
    head: int
    frozen: bool
    attention: int
    peak: float | None

    @classmethod
    def from_shape(cls, shape: Shape, frozen: bool, peak: float | None = None) -> "ModelFlops":
        """Count those of a model that has not been built; see the attributes for the arguments."""
        return cls(shape.products, shape.hidden * shape.vocab, frozen, shape.layers * shape.query, peak)

    def step(self, tokens: float, squared_lengths: float, logits: float | None = None) -> float:
        """Return the operations of a step, forward and backward.

        Args:
            tokens: of the step.
            squared_lengths: sum of the squared lengths of its conversations.
            logits: tokens that pass through the output layer; None: all.
        """
        per_weight = 4 if self.frozen else 6
        if logits is None:
            logits = tokens
        products = (self.weights - self.head) * tokens + self.head * logits
        return per_weight * products + 3 * 2 * self.attention * squared_lengths

    def mfu(self, tokens: float, squared_lengths: float, seconds: float, logits: float | None = None) -> float | None:
        """Return the share of the hardware's peak that was useful work, None where unknown."""
        if not self.peak or not seconds:
            return None
        return self.step(tokens, squared_lengths, logits) / seconds / self.peak
