"""A frozen layer and its LoRA as one operation equals the two of them."""

import pytest


@pytest.fixture(scope="module")
def fused():
    """(module, torch) once Megatron can be imported here."""
    from posttrain import patches

    patches.apply(patches.Platform("cpu", False))
    import torch

    from posttrain.peft import fused

    return fused, torch


def test_values_and_gradients(fused):
    module, torch = fused
    torch.manual_seed(0)
    shapes = {"x": (5, 1, 12), "weight": (7, 12), "a": (3, 12), "b": (7, 3)}
    values = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    results = []
    for way in ("fused", "plain"):
        x, weight, a, b = (values[name].clone().requires_grad_(name != "weight") for name in shapes)
        if way == "fused":
            y = module.FrozenLinearWithLoRA.apply(x, weight, a, b, 0.7)
        else:
            y = x @ weight.t() + 0.7 * (x @ a.t()) @ b.t()
        (y.sin() * torch.arange(7)).sum().backward()
        results.append([y.detach(), x.grad, a.grad, b.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_norm_and_linear_in_one_module(fused):
    module, torch = fused
    from types import SimpleNamespace

    x, gamma = torch.randn(4, 8), torch.rand(8)
    base = SimpleNamespace(layer_norm_weight=gamma, zero_centered_gamma=True, normalization="RMSNorm", eps=1e-5)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (gamma + 1)
    torch.testing.assert_close(module.normalised(base, x), expected)
    assert module.normalised(torch.nn.Linear(8, 8), x) is x
