"""A prompt longer than a model's windows and its original context: what short prompts cannot tell apart.

How long one may be follows from the model's sizes alone, so that every process decides the same.
"""

from dataclasses import dataclass
from math import ceil, isqrt
from typing import TYPE_CHECKING

import torch

from posttrain.convert.megatron_logits import LENGTH, PROMPTS
from posttrain.models.families import position_limit_of
from posttrain.models.families.field_rules import spans_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PRODUCTS = {"cpu": 5e10, "cuda": 5e14}  # multiplications and additions of one pass over the prompt: seconds
LOGITS = 2**30  # bytes of its logits in fp32
SCORES = 2**31  # bytes of a layer's attention scores in fp32, three copies
SEED = 0


@dataclass(frozen=True)
class LongPrompt:
    """How long the prompt is.

    Attributes:
        length: tokens, 0: short prompts tell everything that this model has, or it would take too long.
        unseen: spans that it is too short for, by name.
    """

    length: int
    unseen: dict[str, int]


def plan(config: "PretrainedConfig", device: str) -> LongPrompt:
    """Choose the length for a model.

    Args:
        config: the model's.
        device: "cpu" or "cuda", where it is computed.
    """
    fields = config.to_dict()
    limit = position_limit_of(fields)
    most = affordable(config, device)
    length = 0
    unseen = {}
    for name, span in spans_of(fields).items():
        needed = ceil((span + LENGTH) / LENGTH) * LENGTH
        if span < LENGTH or (limit is not None and needed > limit):
            continue  # seen by the short ones, or never trained
        if needed <= most:
            length = max(length, needed)
        else:
            unseen[name] = span
    return LongPrompt(length, unseen)


def affordable(config: "PretrainedConfig", device: str) -> int:
    """The most tokens that take seconds and fit, estimated from the sizes of a decoder."""
    rows, hidden = config.vocab_size, config.hidden_size
    weights = 12 * config.num_hidden_layers * hidden**2 + rows * hidden
    by_time = int(PRODUCTS[device] / (2 * weights))
    by_logits = LOGITS // (4 * rows)
    by_scores = isqrt(SCORES // (12 * config.num_attention_heads))
    return min(by_time, by_logits, by_scores)


def encode(tokenizer: "PreTrainedTokenizerBase", vocabulary: int, length: int) -> torch.Tensor:
    """Tokens of the short prompts in a random order, always the same: int64[1, length].

    Args:
        tokenizer: of the model.
        vocabulary: rows of its embedding; ids outside are wrapped.
        length: tokens.
    """
    ids: list[int] = []
    for text in PROMPTS:
        ids += tokenizer(text, add_special_tokens=False).input_ids
    chosen = torch.randint(len(ids), (length,), generator=torch.Generator().manual_seed(SEED))
    return (torch.tensor(ids)[chosen] % vocabulary)[None]
