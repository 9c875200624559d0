"""Soft-capped attention by its kernels, and how far it is from Transformers'; a command for a CPU.

TRITON_INTERPRET=1 python tests/ops/capped_reference.py
"""

import sys

import torch
from gemma2_attention import SOFTCAP, theirs

from posttrain import patches
from posttrain.ops import capped_kernels
from posttrain.ops.capped_attention import Visible, attend
from posttrain.ops.capped_kernels import Choice, Tiles

LONG, SQUARE, WIDE = Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 32, 4, 1)
# ends of the documents, tokens, window, (heads, groups, features), tiles: those of a program longer and shorter than
# what its loop goes over, keys and values by kernels of their own or by one
CASES = [
    ([0, 3, 130, 131, 200, 200, 200], 200, None, (4, 2, 16), Choice(LONG, LONG, LONG, WIDE)),
    ([0, 3, 130, 131, 200, 200, 200], 200, 40, (4, 2, 16), Choice(WIDE, WIDE, WIDE, LONG)),
    ([0, 64, 100], 150, 30, (2, 1, 24), Choice(SQUARE, SQUARE, SQUARE, SQUARE)),
    ([0, 97], 97, None, (3, 1, 32), Choice(LONG, WIDE, SQUARE, SQUARE)),
    ([0, 128], 128, 1, (2, 1, 16), Choice(LONG, LONG, LONG, LONG)),
    ([0, 7], 7, None, (1, 1, 8), Choice(LONG, LONG, LONG, LONG)),
]


def differences(case):
    """The largest of the output and the gradients, over the largest number of what is right."""
    from posttrain.ops.attention import first_visible  # imports Megatron

    ends, total, window, (heads, groups, width), choice = case
    capped_kernels.choose = lambda states: choice
    generator = torch.Generator().manual_seed(0)
    states = []
    for count, size in ((heads, 6.0), (groups, 6.0), (groups, 1.0)):
        states.append((size * torch.randn(total, count, width, generator=generator)).requires_grad_())
    upstream = torch.randn(total, heads, width, generator=generator)
    lengths = torch.tensor([*ends, total]).diff()
    right = theirs(states, lengths[lengths > 0].tolist(), window, 0.25)
    visible = Visible.from_first(first_visible(torch.tensor(ends, dtype=torch.int32), total, window))
    found = attend(*states, visible, SOFTCAP, 0.25)
    pairs = [(found, right)]
    pairs += zip(
        torch.autograd.grad(found, states, upstream), torch.autograd.grad(right, states, upstream), strict=True
    )
    return [((one - other).abs().max() / other.abs().max()).item() for one, other in pairs]


def main():
    """Exit with what is wrong."""
    patches.apply(patches.Platform("cpu", False))
    wrong = []
    for case in CASES:
        found = differences(case)
        if not max(found) < 2e-5:  # also where one is not a number
            wrong.append(f"{case}: {found}")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
