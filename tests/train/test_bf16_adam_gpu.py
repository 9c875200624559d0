"""AdamW with a state of six bytes a weight, on a GPU: fp32 AdamW's weights, and a state that is loaded as it was."""

import pytest
import torch

pytestmark = pytest.mark.gpu
SIZES = (70_001, 512)
RATE, BETAS, DECAY = 1e-3, (0.9, 0.95), 0.1


@pytest.fixture(scope="module")
def adam(gpu):
    """The class, on this process's GPU."""
    from posttrain.train.bf16_adam import BFloat16Adam

    return BFloat16Adam


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(0.02 * torch.randn(size, device="cuda").bfloat16()) for size in SIZES]


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(step)
    return [torch.randn(size, device="cuda") for size in SIZES]


def build(adam, parameters):
    """As Megatron builds it."""
    return adam(
        parameters, lr=RATE, betas=BETAS, weight_decay=DECAY, adam_w_mode=True, master_weights=True,
        master_weight_dtype=torch.float32, use_decoupled_grad=True, store_param_remainders=True,
        exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16,
    )  # fmt: skip


def train(optimizer, parameters, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.decoupled_grad = gradient
        optimizer.step()


def test_near_adamw_in_fp32(adam):
    """Rounded moments change a step by less than a hundredth; weights that only bf16 had would not move by one."""
    parameters = weights()
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights()]
    exact = torch.optim.AdamW(masters, lr=RATE, betas=BETAS, weight_decay=DECAY)
    start = [master.detach().clone() for master in masters]
    train(build(adam, parameters), parameters, range(50))
    for step in range(50):
        for master, gradient in zip(masters, gradients(step), strict=True):
            master.grad = gradient
        exact.step()
    for parameter, master, before in zip(parameters, masters, start, strict=True):
        moved = torch.linalg.norm(master - before)
        rounding = torch.linalg.norm(master.bfloat16().float() - master)
        assert torch.linalg.norm(parameter.float() - master) < 0.02 * moved + 1.1 * rounding


def test_loaded_as_it_was(adam):
    """Without copies: six bytes a weight, the same tensors, and the same weights after more steps."""
    parameters = weights()
    optimizer = build(adam, parameters)
    train(optimizer, parameters, range(5))
    saved = optimizer.state_dict()
    tensors = saved["state"][0]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.int16}
    for name, tensor in tensors.items():
        assert tensor.data_ptr() == optimizer.state[parameters[0]][name].data_ptr()

    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = build(adam, again)
    states = {}
    for index, state in saved["state"].items():
        states[index] = {name: tensor.clone() for name, tensor in state.items()}
    resumed.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
    assert resumed.state[again[0]]["exp_avg"].data_ptr() == states[0]["exp_avg"].data_ptr()
    train(optimizer, parameters, range(5, 10))
    train(resumed, again, range(5, 10))
    for one, other in zip(parameters, again, strict=True):
        assert torch.equal(one, other)
