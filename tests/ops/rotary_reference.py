"""Queries, keys and values as they are defined, and how far the kernels are from that; a command for a CPU.

TRITON_INTERPRET=1 python tests/ops/rotary_reference.py
"""

import sys

import torch

# groups, queries of a group, features of a head, of which are rotated, whether queries and keys are normalised
CASES = [
    (2, 2, 8, 8, False), (1, 3, 12, 4, False), (2, 1, 8, 8, True), (2, 3, 12, 6, True), (3, 1, 16, 16, True),
    (8, 4, 128, 128, False), (4, 8, 128, 128, True), (4, 1, 96, 24, False), (2, 9, 256, 256, False),
]  # fmt: skip
EPS = 1e-5


def defined(mixed, groups, width, cos, sin, gammas):
    """Split, then normalise, then rotate halves (arXiv 2104.09864, as GPT-NeoX has it)."""
    tokens = mixed.size(0)
    heads = mixed.view(tokens, groups, -1, width)
    query, key, value = heads[:, :, :-2].reshape(tokens, -1, width), heads[:, :, -2], heads[:, :, -1]

    def rotated(states, gamma):
        if gamma is not None:
            states = states * (states.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma
        half = cos.size(1)
        one, other, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
        cosine, sine = cos[:, None], sin[:, None]
        return torch.cat([one * cosine - other * sine, other * cosine + one * sine, rest], -1)

    of_query, of_key = gammas or (None, None)
    return rotated(query, of_query), rotated(key, of_key), value


def differences(case, device, dtype, tokens=7):
    """Relative ones of queries, keys, values and the gradient of their joint tensor."""
    from posttrain.ops.query_key_value import SplitAndRotate

    groups, per, width, rotated, normed = case
    torch.manual_seed(0)
    mixed = torch.randn(tokens, groups * (per + 2) * width, device=device).to(dtype).requires_grad_()
    angles = 100 * torch.rand(tokens, rotated // 2, device=device)
    gammas = None
    if normed:
        gammas = tuple((torch.rand(width, device=device) + 0.5).to(dtype) for _ in range(2))
    found = SplitAndRotate.apply(mixed, groups, width, angles.cos(), angles.sin(), gammas, EPS)
    exact = mixed.detach().double().requires_grad_()
    weights = gammas and tuple(gamma.double() for gamma in gammas)
    expected = defined(exact, groups, width, angles.double().cos(), angles.double().sin(), weights)
    upstream = [torch.randn_like(part) for part in found]
    found += torch.autograd.grad(found, mixed, upstream)
    expected += torch.autograd.grad(expected, exact, [part.double() for part in upstream])
    pairs = zip(found, expected, strict=True)
    return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]


def main():
    """Compare in fp32; the exit code says whether all are right."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    worst = max(max(differences(case, "cpu", torch.float32)) for case in CASES)
    print(worst)
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
