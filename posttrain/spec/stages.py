"""The layers of each pipeline stage: the fastest division, and what `trainer.megatron` says instead."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import UserError
from posttrain.spec.stage_layout import check_layout

ENDS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
FIRST = "num_layers_in_first_pipeline_stage"
LAST = "num_layers_in_last_pipeline_stage"
LAYOUT = "pipeline_model_parallel_layout"
VIRTUAL = "virtual_pipeline_model_parallel_size"
PREDICTIONS = "mtp_num_layers"
SECTION = "trainer.megatron.model"


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


def own_options(sections: Mapping[str, Any]) -> dict[str, Any]:
    """What `trainer.megatron` says of the layers that each pipeline stage has; empty: nothing."""
    options = _options(sections)
    named = {key: options[key] for key in (*ENDS, FIRST, LAST, LAYOUT, VIRTUAL) if options.get(key)}
    if named and options.get(PREDICTIONS):
        named[PREDICTIONS] = options[PREDICTIONS]
    return named


def own_stages(options: Mapping[str, Any], layers: int, stages: int) -> tuple[int, ...] | None:
    """Layers of each pipeline stage that `options` divide, its virtual ones together.

    Args:
        options: see `own_options`.
        layers, stages: see `check_stages`.

    Returns:
        None where they can't be divided so, which `check_stages` refuses.
    """
    try:
        _check_numbers(options)
        parts = _own_parts(options, layers, stages)
    except UserError:
        return None
    return tuple(sum(parts[stage::stages]) for stage in range(stages))


def check_recomputed(recompute_layers: int | None, layers: int, lengths: Sequence[int]) -> None:
    """Refuse more layers to compute again than there are where most are.

    Args:
        recompute_layers: as in `trainer`.
        layers: transformer layers of the model.
        lengths: of them, in each pipeline stage.

    Raises:
        UserError: no stage has so many.
    """
    most = max(lengths)
    if recompute_layers is None or recompute_layers <= most:
        return
    there = f"the model has {layers} layers"
    if len(lengths) > 1:
        there = f"of the model's {layers} layers no pipeline stage has more than {most}"
    raise UserError(
        f"`trainer.recompute_layers={recompute_layers}`: {there}; set 1 to {most}, or null, which is all of them"
    )


def check_offloaded(offload_layers: int | None, layers: int) -> None:
    """Refuse more layers whose activations wait in the host's memory than the model has.

    Args:
        offload_layers: as in `trainer`.
        layers: transformer layers of the model.

    Raises:
        UserError: there are fewer.
    """
    if offload_layers is not None and offload_layers > layers:
        raise UserError(
            f"`trainer.offload_layers={offload_layers}`: the model has {layers} layers; set 1 to {layers}, or null, "
            "which is none of them"
        )


def check_stages(
    sections: Mapping[str, Any],
    layers: int,
    stages: int,
    recompute_layers: int | None = None,
    predictions: int | None = None,
) -> None:
    """Refuse a division into pipeline stages that Megatron-Core can't make.

    Args:
        sections: `trainer.megatron`.
        layers: transformer layers of the model.
        stages: `parallelism.pipeline_model_parallel_size`.
        recompute_layers: as in `trainer`; compared with stages that `sections` divides.
        predictions: layers of multi-token prediction of the model; None: it has none.

    Raises:
        UserError: fewer layers than stages; in `trainer.megatron.model` keys that don't go together or with one stage,
            or that leave a number that can't be divided, or a layout of other layers or stages; more layers to compute
            again than any stage has.
    """
    key = f"`parallelism.pipeline_model_parallel_size={stages}`"
    if layers < stages:
        raise UserError(f"{key}: each stage needs a layer, of which the model has {layers}; possible: up to {layers}")
    options = _options(sections)
    _check_numbers(options)
    if stages == 1:
        _check_one_stage(options)
        return
    parts = _own_parts(options, layers, stages, predictions)
    if own_options(sections):
        check_recomputed(recompute_layers, layers, parts)


def _own_parts(options: Mapping[str, Any], layers: int, stages: int, predictions: int | None = None) -> Sequence[int]:
    """Layers of each part that a process computes at once, a pipeline stage or a virtual one, in the model's order.

    For the arguments and errors see `check_stages`.
    """
    _check_together(options)
    if options.get(LAYOUT) is not None:
        predictions = options.get(PREDICTIONS, predictions) or 0
        return check_layout(f"{SECTION}.{LAYOUT}", options[LAYOUT], layers, stages, options.get(VIRTUAL), predictions)
    _check_division(options, layers, stages)
    return _lengths(options, layers, stages)


def _check_numbers(options: Mapping[str, Any]) -> None:
    for name in (FIRST, LAST, VIRTUAL):
        value = options.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"`{SECTION}.{name}={value}`: must be a positive whole number")


def _check_one_stage(options: Mapping[str, Any]) -> None:
    for name in (FIRST, LAST, VIRTUAL, LAYOUT):
        if options.get(name) is not None:
            raise UserError(
                f"`{SECTION}.{name}`: there is one stage; remove it, or set parallelism.pipeline_model_parallel_size"
            )


def _check_together(options: Mapping[str, Any]) -> None:
    """Of a layout, numbers of layers, and layers that embedding or loss stand for, there is one."""
    kinds = ((LAYOUT,), (FIRST, LAST), ENDS)
    given = [[name for name in kind if options.get(name)] for kind in kinds]
    named = [names[0] for names in given if names]
    if len(named) > 1:
        raise UserError(f"`{SECTION}.{named[0]}`: does not go with {named[1]}; remove one of them")


def _check_division(options: Mapping[str, Any], layers: int, stages: int) -> None:
    virtual = options.get(VIRTUAL)
    reasons = [name for name in (FIRST, LAST, *ENDS, VIRTUAL) if options.get(name)]
    left, groups = layers, stages
    for name in ENDS:
        left += bool(options.get(name))
    for name in (FIRST, LAST):
        if options.get(name) is None:
            continue
        if virtual is not None and options[name] % virtual:
            raise UserError(
                f"`{SECTION}.{name}={options[name]}`: must be a multiple of {VIRTUAL}={virtual}; change one of them"
            )
        left -= options[name]
        groups -= 1
    if virtual is not None:
        groups *= virtual
    divisible = left == 0
    if groups:
        divisible = left >= groups and left % groups == 0
    if reasons and not divisible:
        raise UserError(
            f"`{SECTION}`: {', '.join(reasons)} leaves {left} layers for {groups} equal stages, of the model's "
            f"{layers}; remove it, and the layers are divided as is fastest"
        )


def _lengths(options: Mapping[str, Any], layers: int, stages: int) -> list[int]:
    """As `_own_parts`, where there is no layout."""
    virtual = options.get(VIRTUAL) or 1
    first, last = options.get(FIRST), options.get(LAST)
    ends = [name for name in ENDS if options.get(name)]
    equal = stages - (first is not None) - (last is not None)
    lengths: list[int] = []
    if equal:
        lengths = [(layers + len(ends) - (first or 0) - (last or 0)) // equal] * equal
    if first is not None:
        lengths.insert(0, first)
    if last is not None:
        lengths.append(last)
    parts = [length // virtual for length in lengths] * virtual
    for index, name in ((0, ENDS[0]), (-1, ENDS[1])):  # embedding and loss stand for a layer there
        if name in ends:
            parts[index] -= 1
    return parts


def _options(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    options = sections.get("model")
    return options if isinstance(options, Mapping) else {}
