"""A frozen layer and its LoRA as one operation equals the two of them."""

import math
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def fused():
    """(module, torch) once Megatron can be imported here."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    import torch

    from posttrain.ops import fused_lora as fused

    return fused, torch


def rms_norm(x, gamma):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gamma


def approximate_gelu(x):
    """As Hendrycks and Gimpel define it, arXiv 1606.08415."""
    return 0.5 * x * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())


@pytest.mark.parametrize("before", ["nothing", "rms", "layer", "silu", "gelu_tanh"])
def test_values_and_gradients(fused, before):
    module, torch = fused
    torch.manual_seed(0)
    width = 24 if before in ("silu", "gelu_tanh") else 12
    shapes = {"x": (5, 1, width), "weight": (7, 12), "a": (3, 12), "b": (7, 3)}
    values = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    gamma, shift = torch.rand(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    operations = {
        "nothing": (None, lambda x: x),
        "rms": (module.Norm(gamma, 1e-5), lambda x: rms_norm(x, gamma)),
        "layer": (
            module.Norm(gamma, 1e-5, shift),
            lambda x: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * gamma + shift
            ),
        ),
        "silu": (module.Activation("silu"), lambda x: x[..., :12] * x[..., :12].sigmoid() * x[..., 12:]),
        "gelu_tanh": (module.Activation("gelu_tanh"), lambda x: approximate_gelu(x[..., :12]) * x[..., 12:]),
    }
    operation, plain = operations[before]
    results = []
    for way in ("fused", "plain"):
        x, weight, a, b = (values[name].clone().requires_grad_(name != "weight") for name in shapes)
        if way == "fused":
            y = module.FrozenLinearWithLoRA.apply(x, weight, None, a, b, 0.7, operation)
        else:
            seen = plain(x)
            y = seen @ weight.t() + 0.7 * (seen @ a.t()) @ b.t()
        (y.sin() * torch.arange(7)).sum().backward()
        results.append([y.detach(), x.grad, a.grad, b.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def exact_gelu(x):
    """x times the normal distribution's integral."""
    return x * 0.5 * (1 + (x / 2**0.5).erf())


@pytest.mark.parametrize("function", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("plain_input", [False, True])
def test_whole_mlp(fused, function, gated, plain_input):
    """The same as norm, layer, activation and layer by themselves; or without norm, bias and the input's gradient."""
    module, torch = fused
    from posttrain.ops.fused_mlp import FrozenMLP, MLPWithLoRA

    torch.manual_seed(0)
    inner = 24 if gated else 12
    shapes = {"x": (5, 1, 8), "a": (3, 8), "b": (inner, 3), "second_a": (2, 12), "second_b": (8, 2)}
    values = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    frozen = ((inner, 8), (8, 12), (8,), (inner,))
    first, second, gamma, bias = (torch.randn(*shape, dtype=torch.float64) for shape in frozen)
    norm = None if plain_input else module.Norm(gamma, 1e-5)
    activation = module.Activation(function, gated, None if plain_input else bias)
    mlp = FrozenMLP(module.Weight(first), module.Weight(second), 0.7, 1.3, activation, norm)
    plain = {"silu": torch.nn.functional.silu, "gelu_tanh": approximate_gelu, "gelu": exact_gelu}[function]
    results = []
    for way in ("fused", "plain"):
        tensors = {}
        for name, value in values.items():
            tensors[name] = value.clone().requires_grad_(name != "x" or not plain_input)
        x, a, b, second_a, second_b = tensors.values()
        if way == "fused":
            y = MLPWithLoRA.apply(x, mlp, a, b, second_a, second_b)
        else:
            y = x if plain_input else rms_norm(x, gamma)
            y = y @ first.t() + 0.7 * (y @ a.t()) @ b.t() + (0 if plain_input else bias)
            y = plain(y[..., :12]) * y[..., 12:] if gated else plain(y)
            y = y @ second.t() + 1.3 * (y @ second_a.t()) @ second_b.t()
        (y.sin() * torch.arange(8)).sum().backward()
        results.append([y.detach(), *(tensor.grad for tensor in tensors.values() if tensor.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_input_without_gradient(fused):
    """The first layer's: the embedding is frozen."""
    module, torch = fused
    x, weight = torch.randn(5, 12), torch.randn(7, 6)
    a, b = torch.randn(3, 6, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    module.FrozenLinearWithLoRA.apply(x, weight, None, a, b, 0.5, module.Activation("silu")).sum().backward()
    expected = torch.autograd.grad(
        (0.5 * (torch.nn.functional.silu(x[:, :6]) * x[:, 6:]) @ a.t() @ b.t()).sum(), (a, b)
    )
    torch.testing.assert_close([a.grad, b.grad], list(expected))


def test_kept_for_the_backward_pass(fused):
    """The input and the rank-r product; not the norm's or the activation's output."""
    module, torch = fused
    x = torch.randn(64, 32, requires_grad=True)
    weight, a, b = torch.randn(8, 16), torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module.FrozenLinearWithLoRA.apply(x, weight, None, a, b, 1.0, module.Activation("silu"))
    shapes = sorted(tuple(tensor.shape) for tensor in kept if tensor.size(0) == 64)
    assert shapes == [(64, 2), (64, 32)]


def test_norm_and_linear_in_one_module(fused):
    module, torch = fused
    x, gamma = torch.randn(4, 8), torch.rand(8)
    base = SimpleNamespace(layer_norm_weight=gamma, zero_centered_gamma=True, normalization="RMSNorm", eps=1e-5)
    torch.testing.assert_close(module.norm_of(base)(x), rms_norm(x, gamma + 1))
    assert module.norm_of(torch.nn.Linear(8, 8)) is None


def test_eight_bit_weight(fused):
    """Products with a quantised weight differ from the exact ones by the rounding of both operands."""
    from posttrain.ops.fp8_linear import Weight, quantise

    _, torch = fused
    torch.manual_seed(0)
    weight, x, upstream = torch.randn(96, 64) * torch.rand(96, 1), torch.randn(50, 64), torch.randn(50, 96)
    eight, scale = quantise(weight)
    assert eight.dtype == torch.float8_e4m3fn
    assert eight.float().abs().amax(1).eq(448).all()
    rounded = eight.float() * scale[:, None]
    assert ((rounded - weight).norm() / weight.norm()).item() < 2**-5
    frozen = Weight(eight, scale)
    for found, exact in (
        (frozen.product(x), x @ weight.t()),
        (frozen.gradient_product()(upstream, None), upstream @ weight),
    ):
        assert ((found - exact).norm() / exact.norm()).item() < 2**-4


def test_gradient_through_eight_bits(fused):
    """As that of the rounded weight."""
    from posttrain.ops.fp8_linear import quantise

    module, torch = fused
    torch.manual_seed(0)
    eight, scale = quantise(torch.randn(48, 32))
    a, b = torch.randn(4, 32) / 6, torch.randn(48, 4) / 2
    x = torch.randn(20, 32, requires_grad=True)
    upstream = torch.randn(20, 48)
    module.FrozenLinearWithLoRA.apply(x, eight, scale, a, b, 1.0, None).backward(upstream)
    exact = upstream @ (eight.float() * scale[:, None] + b @ a)
    assert ((x.grad - exact).norm() / exact.norm()).item() < 2**-5
