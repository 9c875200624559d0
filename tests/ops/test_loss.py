"""The loss of supervised tokens alone, against the loss of all of them."""

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def torch():
    """Torch."""
    import torch

    return torch


@pytest.mark.parametrize("tied", [True, False])
def test_picked_positions_have_the_losses_they_have_among_all(torch, tied):
    """With the output layer's own weight and with the embedding in its place; a filled-up position is repeated."""
    from posttrain.ops.linear_cross_entropy import supervised_losses

    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 1, 5, requires_grad=True), torch.randn(11, 5)
    labels = torch.randint(0, 11, (1, 7))

    def layer(x, weight=None):
        return x @ (layer.weight if weight is None else weight).t(), None

    layer.weight = torch.randn(11, 5)
    used = weight if tied else layer.weight

    def reduce(labels, logits):
        flat = torch.nn.functional.cross_entropy(logits.squeeze(1), labels[0], reduction="none")
        return flat[None]

    at = torch.tensor([1, 4, 6, 0])
    picked = supervised_losses(
        hidden_states=hidden, output_layer=layer, output_weight=weight if tied else None, labels=labels, context=at,
        compute_language_model_loss=reduce, config=SimpleNamespace(), loss_mask=None,
    )  # fmt: skip
    whole = torch.nn.functional.cross_entropy(hidden.squeeze(1) @ used.t(), labels[0], reduction="none")
    torch.testing.assert_close(picked[0], whole[at])
    gradient = torch.autograd.grad(picked[0, :3].sum(), hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(whole[[1, 4, 6]].sum(), hidden)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunked_loss_of_a_frozen_layer(torch, softcap):
    """Values and gradient in bf16 within bf16's own distance from fp32."""
    if not torch.cuda.is_available() or str(torch.cuda.current_device()) == "cpu":
        pytest.skip("no GPU")
    from posttrain.ops.chunk_sizes import LOGIT_ROWS
    from posttrain.ops.linear_cross_entropy import FrozenLinearCrossEntropy

    torch.manual_seed(0)
    rows = LOGIT_ROWS + 300  # the last chunk is not full
    hidden = torch.randn(rows, 256, device="cuda")
    weight, labels = 0.05 * torch.randn(5001, 256, device="cuda"), torch.randint(0, 5001, (rows,), device="cuda")
    upstream = torch.rand(rows, device="cuda")
    exact = hidden.clone().requires_grad_()
    logits = exact @ weight.t()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected.backward(upstream)
    low = hidden.bfloat16().requires_grad_()
    filled_up = torch.cat([weight, torch.ones(7, 256, device="cuda")]).bfloat16()
    losses = FrozenLinearCrossEntropy.apply(low, filled_up, labels, softcap, 5001)
    losses.backward(upstream)
    assert (losses - expected).norm() / expected.norm() < 1e-2
    assert (low.grad.float() - exact.grad).norm() / exact.grad.norm() < 2e-2
