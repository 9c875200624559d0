"""Triton kernels against the same in fp64; on a GPU alone."""

import pytest

pytestmark = pytest.mark.gpu


def relative(found, exact):
    """Norm of the difference over the norm."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("function", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("rank", [0, 40])
def test_activation(torch, function, gated, biased, rank):
    from posttrain.ops.low_rank import LowRank
    from posttrain.ops.recomputed_norms import FUNCTIONS, Activation

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    width = 1000
    inner = 2 * width if gated else width
    bias = random(inner) if biased else None
    values, upstream, added, upstream_added = 2 * random(300, inner), random(300, width), None, None
    exact = values.double().requires_grad_()
    total, exact_upstream = exact, upstream.double()
    if biased:
        total = total + bias.double()
    if rank:
        added = LowRank(random(300, rank), random(inner, rank).t())
        upstream_added = LowRank(random(300, rank), random(rank, width))
        total = total + added.left.double() @ added.right.double()
        exact_upstream += upstream_added.left.double() @ upstream_added.right.double()
    expected = FUNCTIONS[function](total[:, :width])
    if gated:
        expected = expected * total[:, width:]
    expected.backward(exact_upstream)
    activation = Activation(function, gated, bias)
    gradient, again = activation.backward(upstream, values, added, upstream_added)
    assert relative(activation(values, added), expected.detach()) < 3e-3  # bf16's rounding is 2e-3
    assert torch.equal(again, activation(values, added))
    assert relative(gradient, exact.grad) < 3e-3


@pytest.mark.parametrize("width", [4096, 1000])
@pytest.mark.parametrize(("centred", "offset"), [(False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)])
def test_norm(torch, width, centred, offset):
    from posttrain.ops.recomputed_norms import Norm

    x, upstream = (3 * torch.randn(300, width, device="cuda", dtype=torch.bfloat16) + 1 for _ in range(2))
    gamma, shift = (torch.randn(width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    exact = x.double().requires_grad_()
    gains = gamma.double() + offset
    if centred:
        expected = torch.nn.functional.layer_norm(exact, (width,), gains, shift.double(), 1e-5)
    else:
        expected = torch.nn.functional.rms_norm(exact, (width,), gains, 1e-5)
    expected.backward(upstream.double())
    norm = Norm(gamma, 1e-5, shift if centred else None, offset)
    gradient, again = norm.backward(upstream, x)
    assert relative(norm(x), expected.detach()) < 3e-3
    assert torch.equal(again, norm(x))
    assert relative(gradient, exact.grad) < 3e-3


def capped(logits, softcap):
    """Soft-capped logits, by definition."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


@pytest.mark.parametrize(("vocabulary", "stride"), [(256000, 256000), (128257, 128320), (49152, 49152), (999, 999)])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_cross_entropy(torch, vocabulary, stride, softcap):
    from posttrain.ops.triton_kernels import cross_entropy_

    room = torch.full((64, stride), float("nan"), device="cuda", dtype=torch.bfloat16)
    logits = room[:, :vocabulary].normal_(std=3)
    labels, losses = torch.randint(0, vocabulary, (64,), device="cuda"), torch.full((64,), -1.0, device="cuda")
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(capped(exact, softcap), labels, reduction="none")
    expected.sum().backward()
    cross_entropy_(logits, labels, losses, False, softcap)
    assert relative(losses, expected.detach()) < 1e-5
    cross_entropy_(logits, labels, losses, True, softcap)
    assert relative(logits, exact.grad) < 3e-3


@pytest.mark.parametrize("shape", [(4096, 28672), (300, 4096), (7, 512)])
def test_quantise(torch, shape):
    from posttrain.ops.triton_kernels import quantise, transpose

    values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    columns = torch.rand(shape[1], device="cuda") + 0.1
    for factor, given in ((1, None), (columns, columns)):
        eight, scale = quantise(values, given)
        exact = values.double() * factor
        assert torch.allclose(scale.double(), exact.abs().amax(1) / 448)
        assert relative(eight.double() * scale[:, None].double(), exact) < 2**-5
    turned = transpose(eight)
    assert torch.equal(turned.view(torch.int8), eight.view(torch.int8).t())


@pytest.mark.parametrize("tokens", [4096, 100, 7, 1])
def test_products_with_an_eight_bit_weight(torch, tokens):
    from posttrain.ops.fp8_linear import Weight, quantise

    weight = torch.randn(1536, 1024, device="cuda", dtype=torch.bfloat16) / 32
    frozen = Weight(*quantise(weight))
    rounded = frozen.data.double() * frozen.scale[:, None].double()
    x, upstream = (torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in (1024, 1536))
    assert relative(frozen.product(x), x.double() @ rounded.t()) < 2**-4.5
    assert relative(frozen.gradient_product()(upstream, None), upstream.double() @ rounded) < 2**-4.5


@pytest.mark.parametrize("shape", [(16, 4096), (28672, 16), (7, 100)])
def test_gradient_added_to_the_sum(torch, shape):
    """As an fp32 sum of exact products; what is returned is a placeholder."""
    from posttrain.ops.low_rank import weight_gradient

    weight = torch.nn.Parameter(torch.zeros(shape, device="cuda", dtype=torch.bfloat16))
    start = torch.randn(shape, device="cuda")
    weight.main_grad = start.clone()
    upstream, x = (torch.randn(512, n, device="cuda", dtype=torch.bfloat16) for n in shape)
    assert weight_gradient(weight, upstream.t(), x).shape == weight.shape
    assert weight.grad_added_to_main_grad
    assert relative(weight.main_grad, start.double() + upstream.double().t() @ x.double()) < 1e-5
