"""A run that starts from a recipe of Megatron-Bridge's, with a tiny model in the place of the recipe's."""

import pytest
from omegaconf import OmegaConf

pytestmark = pytest.mark.nightly


def test_a_recipe_trains(posttrain, words):
    """The recipe's optimizer and schedule, the command line's model, data and length; the frozen file says both."""
    kept = [word for word in words if not word.startswith(("optimizer.", "scheduler"))]
    result = posttrain("recipe=llama32_1b_peft_1gpu_h100_bf16_config", *kept, "trainer.max_steps=2", "precision=fp32")
    assert result.code == 0, result.err
    assert "recipe llama32_1b_peft_1gpu_h100_bf16_config of Megatron-Bridge" in result.err
    frozen = OmegaConf.load(result.run_dir / "config.yaml")
    assert frozen.recipe.name == "llama32_1b_peft_1gpu_h100_bf16_config"
    assert (frozen.optimizer.adam_beta2, frozen.scheduler.lr_warmup_iters, frozen.peft.rank) == (0.98, 50, 32)
    rates = [line["lr"] for line in result.metrics if "lr" in line]
    assert len(rates) == 2 and rates[0] == pytest.approx(1e-4 / 51)  # the first of the recipe's warm-up of 50 steps
