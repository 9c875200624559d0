"""Activations that wait in the host's memory: the same numbers, and the device's memory without them."""

from itertools import pairwise

import parity
import pytest
import torch
from parity import build, run, write_reference

from posttrain.errors import UserError
from posttrain.models.offloaded_layers import AWAY, chosen_layers

LAYERS = 7


def gradients(parts):
    return {name: p.main_grad.clone() for name, p in parts[0].named_parameters() if p.requires_grad}


def block_of(parts):
    return parts[0].module.decoder


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "all-weights"])
@pytest.mark.parametrize("again", [0, 3, LAYERS], ids="again-{}".format)
def test_same_gradients(family, adapter, again, megatron, tmp_path):
    """Bit-equal, also where layers are computed again; what is away is not here."""
    from posttrain.models.offloaded_activations import OffloadedActivations
    from posttrain.peft import LoRA

    write_reference(family, tmp_path, num_hidden_layers=LAYERS)
    lora = LoRA(rank=4, alpha=8, target_modules="all-linear").build() if adapter else None
    layout = {}
    if again:
        layout = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": again}
    _, parts, logits = build(tmp_path, lora=lora, **layout)
    if adapter:
        parity.randomise_adapters(parts)
    run(parts)
    expected = gradients(parts)
    offloaded = OffloadedActivations(block_of(parts), 5, smallest=1)
    here = []
    weights = {p.data_ptr() for p in parts[0].parameters()}

    def count(module, *_):
        for layer in filter(None, offloaded.layers):
            assert not weights & set(layer.storages)
        here.append(sum(any(s.here is not None for s in layer.storages.values()) for layer in taken))

    taken = [layer for layer in offloaded.layers if layer]
    assert len(taken) == 5
    for layer in block_of(parts).layers:
        layer.register_full_backward_hook(count)
    for _ in range(2):  # the second time with the first one's memory
        run(parts)
        found = gradients(parts)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert torch.equal(logits[0], logits[-1])
    assert all(layer.hosts for layer in taken)
    assert here and 0 < max(here) <= AWAY


def test_layers_are_spread():
    for total in range(1, 90):
        for count in range(1, total + 1):
            chosen = chosen_layers(total, count)
            assert sum(chosen) == count and chosen[0]
            places = [number for number, is_chosen in enumerate(chosen) if is_chosen]
            steps = [b - a for a, b in pairwise(places)]
            assert not steps or max(steps) - min(steps) <= 1


def test_nothing_leaves_without_gradients(megatron, tmp_path):
    from posttrain.models.offloaded_activations import OffloadedActivations

    write_reference("llama", tmp_path, num_hidden_layers=2)
    _, parts, _ = build(tmp_path)
    offloaded = OffloadedActivations(block_of(parts), 2, smallest=1)
    with torch.no_grad():
        parity.forward_step(iter([None]), parts[0])
    assert not any(layer.hosts for layer in offloaded.layers)


def test_two_forward_passes_before_the_backward_pass_are_refused(megatron, tmp_path):
    """The second one takes the first one's place; a third one alone is as if they had not been."""
    from posttrain.models.offloaded_activations import OffloadedActivations

    write_reference("llama", tmp_path, num_hidden_layers=3)
    _, parts, _ = build(tmp_path)
    run(parts)
    expected = gradients(parts)
    OffloadedActivations(block_of(parts), 3, smallest=1)
    losses = []
    for _ in range(2):
        output, _ = parity.forward_step(iter([None]), parts[0])
        losses.append(output.sum())
    with pytest.raises(UserError, match=r"trainer.offload_layers=3.*a second time"):
        sum(losses).backward()
    run(parts)
    found = gradients(parts)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
