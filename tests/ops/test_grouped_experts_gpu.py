"""A mixture's kernels and grouped products on a GPU: against fp64, and replayed in a CUDA graph with other routings."""

import mixture_reference as reference
import pytest
from test_kernels import relative

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, INNER, EXPERTS, CHOSEN, RANK = 512, 256, 384, 16, 4, 8
BF16 = 4e-3  # its rounding is 2e-3
EIGHT_BIT = 2**-4


def choices(torch, seed, experts=EXPERTS):
    """Probabilities [t, experts] and where they are used. No token goes to the last expert, many to the first."""
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.randn(TOKENS, experts, device="cuda", generator=generator)
    scores[:, 0] += 2
    scores[:, -1] = -100
    best = scores.topk(CHOSEN, 1)
    empty = torch.zeros_like(scores)
    return empty.scatter(1, best.indices, best.values.softmax(1)), empty.bool().scatter(1, best.indices, True)


def layer(torch, dtype):
    """x, L, B, W1 and W2."""
    generator = torch.Generator("cuda").manual_seed(9)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    x, low, b = draw(TOKENS, HIDDEN), draw(TOKENS, RANK), draw(2 * INNER, RANK) / RANK
    first, second = draw(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5, draw(EXPERTS, HIDDEN, INNER) / INNER**0.5
    return [tensor.to(torch.bfloat16).to(dtype) for tensor in (x, low, b, first, second)]


def exact_layer(torch, x, probabilities, low, b, first, second, chosen):
    """The same, an expert after the other."""
    y, total = torch.zeros_like(x), x.new_zeros(TOKENS, INNER)
    for expert in range(EXPERTS):
        tokens = chosen[:, expert].nonzero()[:, 0]
        gate, up = (x[tokens] @ first[expert].t() + low[tokens] @ b.t()).chunk(2, 1)
        h = probabilities[tokens, expert, None] * torch.nn.functional.silu(gate) * up
        y = y.index_add(0, tokens, h @ second[expert].t())
        total = total.index_add(0, tokens, h)
    return y, total


def upstream_gradients(torch):
    """Of the outputs."""
    generator = torch.Generator("cuda").manual_seed(3)
    shapes = [(TOKENS, HIDDEN), (TOKENS, INNER)]
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


def outputs_and_gradients(torch, function, inputs, upstream):
    """Of `function`, which gives two outputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    found = function(*inputs)
    given = [gradient.to(one.dtype) for gradient, one in zip(upstream, found, strict=True)]
    return [*found, *torch.autograd.grad(found, inputs, given)]


@pytest.mark.parametrize("eight_bit", [False, True])
def test_layer_against_fp64(torch, eight_bit):
    from posttrain.ops.fp8_linear import quantise
    from posttrain.ops.grouped_experts import ExpertWeights, Routing, frozen_experts

    probabilities, chosen = choices(torch, 1)
    x, low, b, first, second = layer(torch, torch.bfloat16)
    frozen = [ExpertWeights(first), ExpertWeights(second)]
    if eight_bit:
        frozen = []
        for weights in (first, second):
            eight, scale = quantise(weights.view(-1, weights.size(-1)))
            frozen.append(ExpertWeights(eight.view(weights.shape), scale.view(weights.shape[:2])))
    routing = Routing.from_map(chosen, CHOSEN)
    upstream = upstream_gradients(torch)
    found = outputs_and_gradients(
        torch, lambda *four: frozen_experts(*four, *frozen, routing, True), [x, probabilities, low, b], upstream
    )
    x, low, b, first, second = layer(torch, torch.float64)
    exact = outputs_and_gradients(
        torch,
        lambda *four: exact_layer(torch, *four, first, second, chosen),
        [x, probabilities.double(), low, b],
        upstream,
    )
    errors = [relative(one, other) for one, other in zip(found, exact, strict=True)]
    print(errors)
    assert max(errors) < (EIGHT_BIT * 1.5 if eight_bit else 3 * BF16)


def test_routing(torch):
    from posttrain.ops.grouped_experts import Routing

    _, chosen = choices(torch, 2)
    routing = Routing.from_map(chosen, CHOSEN)
    expert, token = chosen.t().nonzero().t()
    assert torch.equal(routing.expert, expert) and torch.equal(routing.token, token)
    assert torch.equal(routing.ends.long(), chosen.sum(0).cumsum(0))
    assert torch.equal(token[routing.rows], torch.arange(TOKENS, device="cuda")[:, None].expand(-1, CHOSEN))


def capture(torch, compute, *inputs):
    """A CUDA graph of `compute` on these inputs, and the results that a replay fills."""
    compute(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = compute(*inputs)
    return graph, captured


def test_replayed_with_other_routings(torch):
    """Bit by bit what is computed without a graph; and the same each time."""
    from posttrain.ops.grouped_experts import ExpertWeights, Routing, frozen_experts

    x, low, b, first, second = layer(torch, torch.bfloat16)
    probabilities, chosen = choices(torch, 1)
    frozen = ExpertWeights(first), ExpertWeights(second)
    upstream = upstream_gradients(torch)

    def compute(probabilities, chosen):
        routing = Routing.from_map(chosen, CHOSEN)
        return outputs_and_gradients(
            torch,
            lambda *four: frozen_experts(*four, *frozen, routing, True),
            [x, probabilities, low, b],
            upstream,
        )

    graph, captured = capture(torch, compute, probabilities, chosen)
    for seed in (4, 5, 6):
        others = choices(torch, seed)
        assert not torch.equal(others[1].sum(0), chosen.sum(0))
        probabilities.copy_(others[0])
        chosen.copy_(others[1])
        graph.replay()
        for one, other in zip(captured, compute(*others), strict=True):
            assert torch.equal(one, other)


def test_quantised_rows_and_transposed_matrices(torch):
    from posttrain.ops.expert_kernels import quantise_rows, transpose

    values = torch.randn(300, 1000, device="cuda", dtype=torch.bfloat16)
    columns = torch.rand(5, 1000, device="cuda") + 0.1
    expert = torch.randint(5, (300,), device="cuda")
    source = torch.randint(300, (400,), device="cuda")
    gathered = values[source].double()
    cases = [
        (quantise_rows(values, source), gathered),
        (quantise_rows(values, None, columns, expert), values.double() * columns[expert].double()),
        (quantise_rows(values, source[:300], columns, expert), gathered[:300] * columns[expert].double()),
    ]
    for (eight, scale), exact in cases:
        assert torch.allclose(scale.double(), exact.abs().amax(1) / 448)
        assert relative(eight.double() * scale[:, None].double(), exact) < 2**-5
    matrices = eight.view(3, 100, 1000)
    assert torch.equal(transpose(matrices).view(torch.int8), matrices.view(torch.int8).transpose(1, 2))


def frozen_weights(torch, weights, eight_bit):
    """ExpertWeights of both matrices."""
    from posttrain.ops.grouped_experts import ExpertWeights

    if eight_bit:
        return [reference.in_eight_bits(matrix) for matrix in weights]
    return [ExpertWeights(matrix) for matrix in weights]


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("routing", reference.ROUTINGS)
def test_experts_of_several_processes(torch, routing, count, eight_bit):
    """One process after another, in memory that is NaN where nobody has written, against fp64."""
    k, _ = reference.ROUTINGS[routing]
    probabilities, chosen = reference.choices(routing, "cuda")
    upstream = torch.randn(reference.TOKENS, reference.HIDDEN, device="cuda").bfloat16()
    tensors, weights = reference.layer(torch.bfloat16, "cuda")
    frozen = frozen_weights(torch, weights, eight_bit)
    with reference.poisoned_memory("cuda"):
        found = reference.with_gradients(
            lambda *inputs: reference.of_processes(count, *inputs, frozen, chosen, k), tensors, probabilities, upstream
        )
    tensors, weights = reference.layer(torch.float64, "cuda")
    exact = reference.with_gradients(
        lambda *inputs: reference.one_by_one(*inputs, weights, chosen), tensors, probabilities.double(), upstream
    )
    errors = [relative(one, other) for one, other in zip(found, exact, strict=True)]
    print(errors)
    assert max(errors) < (EIGHT_BIT * 1.5 if eight_bit else 4 * BF16)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_several_processes_replayed_with_other_routings(torch, eight_bit):
    """Bit by bit what is computed without a graph, each time in memory full of NaN."""
    count = 4
    tensors, weights = reference.layer(torch.bfloat16, "cuda")
    frozen = frozen_weights(torch, weights, eight_bit)
    probabilities, chosen = reference.choices("uneven", "cuda")
    upstream = torch.randn(reference.TOKENS, reference.HIDDEN, device="cuda").bfloat16()

    def compute(probabilities, chosen):
        rows = reference.TOKENS * CHOSEN
        poison = [torch.full((rows, 2 * reference.INNER), torch.nan, device="cuda") for _ in range(16)]
        del poison
        return reference.with_gradients(
            lambda *inputs: reference.of_processes(count, *inputs, frozen, chosen, CHOSEN),
            tensors,
            probabilities,
            upstream,
        )

    graph, captured = capture(torch, compute, probabilities, chosen)
    for routing, seed in (("uneven", 4), ("a process without a row", 5), ("all to one process", 6), ("uneven", 7)):
        others = reference.choices(routing, "cuda", seed)
        probabilities.copy_(others[0])
        chosen.copy_(others[1])
        graph.replay()
        for one, other in zip(captured, compute(*others), strict=True):
            assert other.isfinite().all() and torch.equal(one, other)
