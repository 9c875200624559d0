"""Activations and norms as they are defined, and how far the kernels are from that; a command for a CPU.

TRITON_INTERPRET=1 python tests/ops/elementwise_reference.py
"""

import itertools
import sys

import torch
import torch.nn.functional as F

FUNCTIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}
# function, gated, biased, rank of what is added
ACTIVATIONS = [
    (*kind, *rest) for kind in itertools.product(FUNCTIONS, (True, False)) for rest in ((True, 40), (False, 0))
]
NORMS = list(itertools.product((False, True), (0.0, 1.0), (100,)))  # centred, offset of the gains, width
TOKENS, WIDTH, EPS = 37, 150, 1e-5  # no multiples of a tile


def relative(found, exact):
    """Norm of the difference over the norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def activation_differences(case):
    """Relative ones of the output, the gradient, and the output of the backward pass."""
    from posttrain.ops.activation_kernels import activation, activation_backward
    from posttrain.ops.low_rank import LowRank

    function, gated, biased, rank = case
    inner = 2 * WIDTH if gated else WIDTH
    torch.manual_seed(0)
    values, upstream = torch.randn(TOKENS, inner), torch.randn(TOKENS, WIDTH)
    bias = torch.randn(inner) if biased else None
    added = upstream_added = None
    exact = values.double().requires_grad_()
    total, exact_upstream = exact, upstream.double()
    if biased:
        total = total + bias.double()
    if rank:
        added = LowRank(torch.randn(TOKENS, rank), torch.randn(inner, rank).t())
        upstream_added = LowRank(torch.randn(TOKENS, rank), torch.randn(rank, WIDTH))
        total = total + added.left.double() @ added.right.double()
        exact_upstream += upstream_added.left.double() @ upstream_added.right.double()
    expected = FUNCTIONS[function](total[:, :WIDTH])
    if gated:
        expected = expected * total[:, WIDTH:]
    expected.backward(exact_upstream)
    gradient, again = activation_backward(upstream, values, function, gated, bias, added, upstream_added)
    found = [activation(values, function, gated, bias, added), gradient, again]
    right = [expected.detach(), exact.grad, expected.detach()]
    return [relative(one, other) for one, other in zip(found, right, strict=True)]


def norm_differences(case):
    """The same of a norm."""
    from posttrain.ops.norm_kernels import norm, norm_backward

    centred, offset, width = case
    torch.manual_seed(0)
    x, upstream = 3 * torch.randn(TOKENS, width) + 1, torch.randn(TOKENS, width)
    gains, shift = torch.randn(width), torch.randn(width)
    exact = x.double().requires_grad_()
    if centred:
        expected = F.layer_norm(exact, (width,), gains.double() + offset, shift.double(), EPS)
    else:
        shift = None
        expected = F.rms_norm(exact, (width,), gains.double() + offset, EPS)
    expected.backward(upstream.double())
    gradient, again = norm_backward(upstream, x, gains, shift, EPS, offset)
    found = [norm(x, gains, shift, EPS, offset), gradient, again]
    right = [expected.detach(), exact.grad, expected.detach()]
    return [relative(one, other) for one, other in zip(found, right, strict=True)]


def main():
    """Compare in fp32; the exit code says whether all are right."""
    wrong = []
    for cases, differences in ((ACTIVATIONS, activation_differences), (NORMS, norm_differences)):
        wrong += [(case, off) for case in cases if max(off := differences(case)) > 1e-5]
    sys.exit("\n".join(map(str, wrong)) or 0)


if __name__ == "__main__":
    main()
