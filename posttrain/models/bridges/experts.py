"""LoRA on experts that are modules of their own (layers without Transformer Engine), under expert parallelism.

Upstream numbers such adapters by their place on the own process, so that an export holds one process's experts and a
merge adds its adapters to everybody's. Grouped experts, Transformer Engine's, are right upstream.
"""

import dataclasses
import re
from collections.abc import Iterator

import torch
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple
from megatron.bridge.models.conversion.peft_bridge import AdapterWeight
from megatron.core import parallel_state

EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
LOCAL = ".local_experts."


class SeparateExperts:
    """Mixin of a MegatronModelBridge of a mixture of experts."""

    def build_adapter_conversion_tasks(self, megatron_model, *args, **kwargs) -> dict[str, list]:
        """As upstream's, under the experts' numbers in the whole model."""
        tasks = super().build_adapter_conversion_tasks(megatron_model, *args, **kwargs)
        here = experts_here(megatron_model)
        first = here * parallel_state.get_expert_model_parallel_rank()

        def number(prefix: str) -> str:
            return EXPERT.sub(lambda found: str(first + int(found[0])), prefix) if LOCAL in prefix else prefix

        return {
            number(prefix): [dataclasses.replace(task, global_base_prefix=number(prefix)) for task in group]
            for prefix, group in tasks.items()
        }

    def stream_adapter_weights_megatron_to_hf(self, megatron_model, *args, **kwargs) -> Iterator[HFWeightTuple]:
        """As upstream's, with the experts of all processes."""
        separate = any(LOCAL in name for part in megatron_model for name, _ in part.named_parameters())
        here = experts_here(megatron_model)
        for name, weight in super().stream_adapter_weights_megatron_to_hf(megatron_model, *args, **kwargs):
            found = EXPERT.search(name)
            if found is None or not separate:
                yield HFWeightTuple(name, weight)
                continue
            for process, part in enumerate(gathered(weight)):
                yield HFWeightTuple(EXPERT.sub(str(process * here + int(found[0]) % here), name), part)

    def _merge_lora_adapter_weights(
        self, megatron_model, converted_weights_dict: dict[str, torch.Tensor], adapter_weights: list[AdapterWeight]
    ) -> dict[str, torch.Tensor]:
        """As upstream's, each expert with its own adapter."""
        merge = super()._merge_lora_adapter_weights
        if LOCAL not in adapter_weights[0].global_base_prefix:
            return merge(megatron_model, converted_weights_dict, adapter_weights)
        (mine,) = adapter_weights
        inner, outer = (gathered(part.weight) for part in (mine.linear_in_weight, mine.linear_out_weight))
        merged = {}
        for process, pair in enumerate(zip(inner, outer, strict=True)):
            theirs = {
                name: weight
                for name, weight in converted_weights_dict.items()
                if int(EXPERT.search(name)[0]) // experts_here(megatron_model) == process
            }
            adapter = dataclasses.replace(
                mine,
                linear_in_weight=mine.linear_in_weight._replace(weight=pair[0]),
                linear_out_weight=mine.linear_out_weight._replace(weight=pair[1]),
            )
            merged |= merge(megatron_model, theirs, [adapter])
        return merged


def experts_here(megatron_model) -> int:
    """Experts of each process."""
    return megatron_model[0].config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()


def gathered(weight: torch.Tensor) -> list[torch.Tensor]:
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
