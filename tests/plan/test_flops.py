"""Operations of a step beside those that torch counts in a Transformers model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.plan.flops import ModelFlops
from posttrain.spec.shape import Shape

LENGTH = 24


@pytest.mark.parametrize("logits", [LENGTH, 7])
def test_operations_of_a_step(logits):
    """All weights trained; the output layer sees all tokens, or some. Torch counts attention's masked half, too."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        found = model(torch.zeros(1, LENGTH, dtype=torch.long), logits_to_keep=torch.arange(logits)).logits
        assert found.shape[1] == logits
        found.sum().backward()
    flops = ModelFlops.from_shape(Shape.from_config(config.to_dict()), frozen=False)
    masked = 6 * flops.attention * LENGTH**2
    # Transformers computes the angles of rotary positions as a product of matrices, once and without a gradient.
    angles = 2 * LENGTH * (config.head_dim // 2)
    assert flops.step(LENGTH, LENGTH**2, logits) + masked + angles == counter.get_total_flops()
