"""The planner's counts are those of models that are built: all parameters, and the trained ones."""

import json

import pytest
from families import FAMILIES, save_random
from parity import build
from test_adapters import ATTENTION, NAMES

from posttrain.peft import DoRA, LoRA
from posttrain.spec.shape import Adapters, Shape

KINDS = {
    "none": (None, "all-linear"),
    "lora": (LoRA, "all-linear"),
    "dora": (DoRA, "all-linear"),
    "names": (LoRA, None),  # Hugging Face's, of the family
    "one_layer": (LoRA, ["*.layers.1.self_attention.linear_qkv", "linear_proj"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> directory of its random model."""
    made = {}

    def directory(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_random(family, made[family])
        return made[family]

    return directory


# LoRA on all matrices tells a family's total as well; what else there is depends on dense or experts alone.
CASES = [(family, kind) for family in FAMILIES for kind in ("lora", "names")]
CASES += [(family, kind) for family in ("llama", "mixtral") for kind in ("none", "dora", "one_layer")]


@pytest.mark.parametrize("family, kind", CASES)
def test_counts(family, kind, saved, megatron):
    directory = saved(family)
    adapter, targets = KINDS[kind]
    targets = targets or NAMES.get(family, [*ATTENTION, "up_proj", "down_proj"])
    shape = Shape.from_config(json.loads((directory / "config.json").read_text()))
    lora = adapter(rank=3, target_modules=targets).build() if adapter else None
    _, parts, _ = build(directory, lora=lora)
    sizes = [(p.numel(), p.requires_grad) for part in parts for p in part.parameters()]
    planned = Adapters.from_targets(shape, adapter.__name__, 3, targets, grouped=False).parameters if adapter else 0
    assert sum(size for size, _ in sizes) == shape.parameters + planned
    assert sum(size for size, trained in sizes if trained) == (planned or shape.parameters)
