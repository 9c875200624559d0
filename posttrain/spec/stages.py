"""The layers of each pipeline stage: the fastest division, and what `trainer.megatron` says instead."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import UserError

ENDS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
FIRST = "num_layers_in_first_pipeline_stage"
LAST = "num_layers_in_last_pipeline_stage"
LAYOUT = "pipeline_model_parallel_layout"
VIRTUAL = "virtual_pipeline_model_parallel_size"


@functools.cache  # a search asks again for each of its settings
def divide_layers(layers: int, stages: int, output_layer: float) -> tuple[int, ...]:
    """Divide layers so that the longest stage is as short as possible.

    Of divisions that are equally fast, the last stage has as many layers as possible and the first ones no more than
    those between: the earlier a stage, the more micro-batches it keeps the activations of.

    Args:
        layers: transformer layers, at least one for each stage.
        stages: of the pipeline.
        output_layer: its cost in layers; the last stage has it too.
    """
    if stages == 1:
        return (layers,)
    best, shortest = 1, math.inf
    for last in range(layers // stages, 0, -1):
        longest = max(math.ceil((layers - last) / (stages - 1)), last + output_layer)
        if longest < shortest:
            best, shortest = last, longest
    fewer, rest = divmod(layers - best, stages - 1)
    return (fewer,) * (stages - 1 - rest) + (fewer + 1,) * rest + (best,)


def format_layout(stages: Sequence[int]) -> str:
    """Megatron-Core's word for stages with so many layers, e.g. "Et*2|t*1L": embedding, layers, loss."""
    return "E" + "|".join(f"t*{layers}" for layers in stages) + "L"


def divides_stages(sections: Mapping[str, Any]) -> bool:
    """Whether `trainer.megatron` says which layers a pipeline stage has."""
    options = _options(sections)
    return any(options.get(key) for key in (*ENDS, FIRST, LAST, LAYOUT, VIRTUAL))


def check_stages(sections: Mapping[str, Any], layers: int, stages: int) -> None:
    """Refuse a division into pipeline stages that Megatron-Core can't make; its own layout it checks itself.

    Args:
        sections: `trainer.megatron`.
        layers: transformer layers of the model.
        stages: `parallelism.pipeline_model_parallel_size`.

    Raises:
        UserError: fewer layers than stages, or `trainer.megatron.model` leaves a number that can't be divided.
    """
    key = f"`parallelism.pipeline_model_parallel_size={stages}`"
    if layers < stages:
        raise UserError(f"{key}: each stage needs a layer, of which the model has {layers}; possible: up to {layers}")
    options = _options(sections)
    if stages == 1 or options.get(LAYOUT):
        return
    given = [name for name in (FIRST, LAST) if options.get(name) is not None]
    ends = [name for name in ENDS if options.get(name)]
    left, groups = layers + len(ends), stages
    for name in given:
        if type(options[name]) is not int or options[name] < 1:
            raise UserError(f"`trainer.megatron.model.{name}={options[name]}`: must be a positive whole number")
        left -= options[name]
        groups -= 1
    if given and ends:
        raise UserError(f"`trainer.megatron.model.{given[0]}`: does not go with {ends[0]}; remove one of them")
    virtual = options.get(VIRTUAL) or 1
    reason = ", ".join((*given, *ends))
    if virtual != 1:
        reason = VIRTUAL
        groups *= virtual
    if not reason:
        return
    divisible = left == 0
    if groups:
        divisible = left >= groups and left % groups == 0
    if not divisible:
        raise UserError(
            f"`trainer.megatron.model`: {reason} leaves {left} layers for {groups} equal stages, of the model's "
            f"{layers}; remove it, and the layers are divided as is fastest"
        )


def _options(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    options = sections.get("model")
    return options if isinstance(options, Mapping) else {}
