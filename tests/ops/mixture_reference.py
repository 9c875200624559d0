"""A mixture of frozen experts with shared adapters as it is defined, and as n processes compute it in turn."""

import contextlib

import torch
import torch.nn.functional as F

TOKENS, HIDDEN, INNER, EXPERTS, CHOSEN, RANK = 512, 256, 384, 16, 4, 8
SCALES = (0.5, 0.25)
# Experts of a token, and what is added to tokens' scores of some experts.
ROUTINGS = {
    "uneven": (CHOSEN, {0: 2, 15: -100}),
    "a process without a row": (CHOSEN, dict.fromkeys((4, 5, 6, 7), -100)),
    "all to one process": (CHOSEN, dict.fromkeys((8, 9, 10, 11), 100)),
    "all to one expert": (1, {5: 100}),
}


def choices(routing, device="cpu", seed=1):
    """Probabilities [t, experts], and where they are used."""
    chosen, preferred = ROUTINGS[routing]
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.randn(TOKENS, EXPERTS, device=device, generator=generator)
    for expert, more in preferred.items():
        scores[:, expert] += more
    best = scores.topk(chosen, 1)
    weights = best.values.sub(best.values.amax(1, keepdim=True)).exp() / chosen
    empty = torch.zeros_like(scores)
    return empty.scatter(1, best.indices, weights), empty.bool().scatter(1, best.indices, True)


def layer(dtype, device="cpu"):
    """([x, A1, B1, A2, B2], [W1, W2]), rounded to bf16 first."""
    generator = torch.Generator(device).manual_seed(9)

    def draw(*shape):
        tensor = torch.randn(*shape, device=device, generator=generator) / shape[-1] ** 0.5
        return tensor.to(torch.bfloat16).to(dtype)

    x = draw(TOKENS, HIDDEN) * HIDDEN**0.5
    adapters = [draw(RANK, HIDDEN), draw(2 * INNER, RANK), draw(RANK, INNER), draw(HIDDEN, RANK)]
    return [x, *adapters], [draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)]


def one_by_one(x, probabilities, a1, b1, a2, b2, weights, chosen):
    """As it is defined, an expert after the other."""
    y = torch.zeros_like(x)
    for expert, (first_weight, second_weight) in enumerate(zip(*weights, strict=True)):
        tokens = chosen[:, expert].nonzero()[:, 0]
        gate, up = (x[tokens] @ (first_weight + SCALES[0] * b1 @ a1).t()).chunk(2, 1)
        h = probabilities[tokens, expert, None] * F.silu(gate) * up
        y = y.index_add(0, tokens, h @ (second_weight + SCALES[1] * b2 @ a2).t())
    return y


def of_processes(count, x, probabilities, a1, b1, a2, b2, frozen, chosen, k):
    """The sum over `count` processes of what each adds to all tokens; `frozen`: ExpertWeights of all experts."""
    from posttrain.ops.divided_experts import Exchange, SharedAdapter, adapted_experts
    from posttrain.ops.grouped_experts import ExpertWeights

    adapters = SharedAdapter(a1, b1, SCALES[0]), SharedAdapter(a2, b2, SCALES[1])
    parts = []
    for rank in range(count):
        own = slice(rank * EXPERTS // count, (rank + 1) * EXPERTS // count)
        here = []
        for weights in frozen:
            here.append(ExpertWeights(weights.data[own], None if weights.scale is None else weights.scale[own]))
        parts.append(adapted_experts(x, probabilities, chosen, k, tuple(here), adapters, Exchange(count, rank)))
    return sum(parts[1:], parts[0])


def in_eight_bits(weights):
    """ExpertWeights of matrices [experts, out, in], quantised by rows."""
    from posttrain.ops.fp8_linear import quantise
    from posttrain.ops.grouped_experts import ExpertWeights

    eight, scale = quantise(weights.reshape(-1, weights.size(-1)))
    return ExpertWeights(eight.view(weights.shape), scale.view(weights.shape[:2]))


def with_gradients(function, tensors, probabilities, upstream):
    """[y, gradients of x, the probabilities and the adapters]."""
    x, *adapters = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in (x, probabilities, *adapters)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


@contextlib.contextmanager
def poisoned_memory(device="cpu"):
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
