"""LoRA on experts that are modules of their own (layers without Transformer Engine), under expert parallelism.

Upstream numbers such adapters by their place on the own process, so that an export holds one process's experts and a
merge adds its adapters to everybody's. Grouped experts, Transformer Engine's, are right upstream.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple
from megatron.bridge.models.conversion.peft_bridge import AdapterWeight
from megatron.core import parallel_state

if TYPE_CHECKING:
    # Mixins of upstream's class; at run time it comes after them.
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge as Bridge
    from megatron.bridge.models.conversion.peft_bridge import AdapterWeightConversionTask
    from megatron.core.transformer.module import MegatronModule
else:
    Bridge = object

EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
LOCAL = ".local_experts."


class SeparateExperts(Bridge):
    """Mixin of a MegatronModelBridge of a mixture of experts."""

    def build_adapter_conversion_tasks(
        self, megatron_model: "list[MegatronModule]", *args: object, **kwargs: object
    ) -> "dict[str, list[AdapterWeightConversionTask]]":
        """As upstream's, under the experts' numbers in the whole model."""
        first = experts_here(megatron_model) * parallel_state.get_expert_model_parallel_rank()
        renamed = {}
        for prefix, group in super().build_adapter_conversion_tasks(megatron_model, *args, **kwargs).items():
            expert = EXPERT.search(prefix)
            if LOCAL in prefix and expert:
                prefix = EXPERT.sub(str(first + int(expert[0])), prefix)
            renamed[prefix] = [dataclasses.replace(task, global_base_prefix=prefix) for task in group]
        return renamed

    def stream_adapter_weights_megatron_to_hf(
        self, megatron_model: "list[MegatronModule]", *args: object, **kwargs: object
    ) -> Iterator[HFWeightTuple]:
        """As upstream's, with the experts of all processes."""
        separate = has_separate_experts(megatron_model)
        here = experts_here(megatron_model)
        for name, weight in super().stream_adapter_weights_megatron_to_hf(megatron_model, *args, **kwargs):
            expert = EXPERT.search(name)
            if expert is None or not separate:
                yield HFWeightTuple(name, weight)
                continue
            for process, part in enumerate(gather(weight)):
                number = process * here + int(expert[0]) % here
                yield HFWeightTuple(EXPERT.sub(str(number), name), part)

    def _merge_lora_adapter_weights(
        self,
        megatron_model: "list[MegatronModule]",
        converted_weights_dict: dict[str, torch.Tensor],
        adapter_weights: list[AdapterWeight],
    ) -> dict[str, torch.Tensor]:
        """As upstream's, each expert with its own adapter."""
        merge = super()._merge_lora_adapter_weights
        if LOCAL not in adapter_weights[0].global_base_prefix:
            return merge(megatron_model, converted_weights_dict, adapter_weights)
        (mine,) = adapter_weights
        inner = gather(mine.linear_in_weight.weight)
        outer = gather(mine.linear_out_weight.weight)
        by_process: list[dict[str, torch.Tensor]] = [{} for _ in inner]
        for name, weight in converted_weights_dict.items():
            expert = EXPERT.search(name)
            if expert is None:
                raise ValueError(f"{name}: is no weight of an expert")
            by_process[int(expert[0]) // experts_here(megatron_model)][name] = weight
        merged: dict[str, torch.Tensor] = {}
        for theirs, linear_in, linear_out in zip(by_process, inner, outer, strict=True):
            adapter = dataclasses.replace(
                mine,
                linear_in_weight=mine.linear_in_weight._replace(weight=linear_in),
                linear_out_weight=mine.linear_out_weight._replace(weight=linear_out),
            )
            merged |= merge(megatron_model, theirs, [adapter])
        return merged


def has_separate_experts(megatron_model: "list[MegatronModule]") -> bool:
    """Whether experts are modules of their own."""
    parameters = itertools.chain.from_iterable(part.named_parameters() for part in megatron_model)
    return any(LOCAL in name for name, _ in parameters)


def experts_here(megatron_model: "list[MegatronModule]") -> int:
    """Experts of each process."""
    return megatron_model[0].config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()


def gather(weight: torch.Tensor) -> list[torch.Tensor]:
    """The weights that the processes of the expert-parallel group call this with, in their order."""
    size = parallel_state.get_expert_model_parallel_world_size()
    if size == 1:
        return [weight]
    group = parallel_state.get_expert_model_parallel_group()
    # Collectives of a GPU's group take its memory; exported weights may be on the host already.
    local = weight.to("cuda").contiguous()
    parts = [torch.empty_like(local) for _ in range(size)]
    torch.distributed.all_gather(parts, local, group=group)
    return [part.to(weight.device) for part in parts]
