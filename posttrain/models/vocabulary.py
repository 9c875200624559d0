"""The matrices with a row for each token: which ones they are, and how they grow for a tokenizer with more tokens."""

from typing import TYPE_CHECKING

from posttrain.models.families import families

if TYPE_CHECKING:
    import torch

CHUNK = 8192  # rows
SEED = 0


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name is the embedding of the input's tokens."""
    return any(f".{name}".endswith(f".{family.embedding}") for family in families())


def is_output(name: str) -> bool:
    """Whether a tensor of this name is the output layer's matrix."""
    return any(f".{name}".endswith(f".{family.output_layer}") for family in families())


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of this name has a row for each token."""
    return is_embedding(name) or is_output(name)


def grown(weight: "torch.Tensor", rows: int) -> "torch.Tensor":
    """`weight` [fewer rows, hidden] with new ones below, [rows, hidden]; the same ones each time.

    A new row is drawn from a normal distribution with the old rows' mean and standard deviation in each column. The
    mean alone would make the new tokens one: where the rows are frozen no adapter could tell them apart.
    """
    import torch

    old, width = weight.shape
    if rows <= old:
        return weight
    total = torch.zeros(width, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in weight.split(CHUNK):
        values = chunk.double().cpu()
        total += values.sum(0)
        squares += values.square().sum(0)
    mean = total / old
    deviation = (squares / old - mean.square()).clamp(min=0).sqrt()
    noise = torch.randn(rows - old, width, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return torch.cat([weight, (mean + deviation * noise).to(weight)])
