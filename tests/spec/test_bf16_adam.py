"""`optimizer=adam_bf16`: where it is refused, what it takes, and why its beta2 has a limit."""

import pytest
import torch

from posttrain.config.composition import compose
from posttrain.errors import UserError
from posttrain.plan.memory import estimate_memory
from posttrain.spec.checks import LARGEST_BETA2
from posttrain.spec.resolve import resolve_spec

WORDS = ["model=llama3_8b", "peft=none", "optimizer=adam_bf16", "trainer.seq_length=4096", "trainer.micro_batch_size=1"]
PARAMETERS = 8_030_261_248


def parts(*words, world=1):
    """Bytes of a GPU by part."""
    return estimate_memory(resolve_spec(compose([*WORDS, *words]), world)).parts


@pytest.mark.parametrize(
    "words, reason",
    [
        (
            ["peft=lora"],
            "it is for all weights (peft=none), and an adapter's state is small anyway; use optimizer=adam",
        ),
        (
            ["precision=fp8"],
            "it requires bf16 weights, and keeps the bits that they lack of fp32 ones; use optimizer=adam",
        ),
        (
            ["precision=fp32"],
            "it requires bf16 weights, and keeps the bits that they lack of fp32 ones; use optimizer=adam",
        ),
        (
            ["optimizer=sgd", "optimizer.use_precision_aware_optimizer=true"],
            "only Adam has such a state; use optimizer=adam",
        ),
    ],
)
def test_refused(words, reason):
    spec = resolve_spec(compose([*WORDS, *words]), 1)
    with pytest.raises(UserError) as error:
        spec.check()
    assert str(error.value).endswith(reason)


def test_half_of_the_state():
    assert parts()["optimizer"] == 6 * PARAMETERS
    assert parts("optimizer=adam")["optimizer"] == 12 * PARAMETERS


def test_divided_among_processes_whatever_the_layout():
    for layout in ("ddp", "zero1"):
        assert parts(f"parallelism={layout}", world=4)["optimizer"] == 6 * PARAMETERS / 4
    assert parts("parallelism=fsdp", world=4)["optimizer"] == 8 * PARAMETERS / 4
    assert parts("parallelism=tp2", "optimizer=adam", world=4)["optimizer"] > 6 * PARAMETERS / 4


def rest(beta2: float, number_format: torch.dtype, steps: int) -> float:
    """What is left of a mean square of 1 after steps whose gradient is 0, on average over where it starts."""
    square = torch.linspace(1, 2, 129, dtype=torch.float32)
    start = square.clone()
    for _ in range(steps):
        square = (beta2 * square).to(number_format).float()
    return float((square / start).mean())


def test_mean_squares_in_bf16_fall_up_to_the_largest_beta2_alone():
    for beta2 in (0.95, LARGEST_BETA2):
        exact = rest(beta2, torch.float32, 30)
        assert rest(beta2, torch.bfloat16, 30) == pytest.approx(exact, rel=0.1)
    assert rest(0.999, torch.float32, 1000) == pytest.approx(0.37, abs=0.01)
    assert rest(0.999, torch.bfloat16, 1000) > 0.99
