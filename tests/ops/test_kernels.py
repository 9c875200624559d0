"""Triton kernels against the same in fp64; on a GPU alone."""

import pytest

pytestmark = pytest.mark.gpu


def relative(found, exact):
    """Norm of the difference over the norm."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("width", [8192, 1000])
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_activation(torch, width, gelu):
    from posttrain.ops.triton_kernels import gated_activation, gated_activation_backward

    both = 2 * torch.randn(300, 2 * width, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(300, width, device="cuda", dtype=torch.bfloat16)
    exact = both.double().requires_grad_()
    gate = exact[:, :width]
    activated = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    expected = activated * exact[:, width:]
    expected.backward(upstream.double())
    gradient, again = gated_activation_backward(upstream, both, gelu)
    assert relative(gated_activation(both, gelu), expected.detach()) < 3e-3  # bf16's rounding is 2e-3
    assert torch.equal(again, gated_activation(both, gelu))
    assert relative(gradient, exact.grad) < 3e-3


def capped(logits, softcap):
    """Soft-capped logits, by definition."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


@pytest.mark.parametrize("vocabulary", [256000, 128256, 49152, 1000])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_cross_entropy(torch, vocabulary, softcap):
    from posttrain.ops.triton_kernels import cross_entropy_

    logits = 3 * torch.randn(64, vocabulary, device="cuda", dtype=torch.bfloat16)
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
    assert relative(frozen.gradient(upstream), upstream.double() @ rounded) < 2**-4.5
