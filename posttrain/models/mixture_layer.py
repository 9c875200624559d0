"""A mixture's layer whose experts are on this process and frozen: grouped products (posttrain.ops.grouped_experts).

Upstream's layer sorts tokens by expert and asks the device how many each expert got, so its host waits in every layer
and its step can't be captured. Here its router and its order of calls stay; the dispatcher hands over the tokens as
they are and where they go, and the experts do the rest. Parameters, their names and adapters are upstream's.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec

from posttrain.ops.fp8_linear import quantise
from posttrain.ops.grouped_experts import ExpertWeights, Routing, frozen_experts


def grouped_layer_spec(config: GPTModelProvider) -> ModuleSpec:
    """Upstream's layers of a mixture with Transformer Engine, with this mixture in them."""
    spec = default_layer_spec(config)
    parts = spec.submodules.mlp.keywords["submodules"]
    experts = partial(GroupedExperts, **parts.experts.keywords)
    spec.submodules.mlp = partial(LocalMixture, submodules=dataclasses.replace(parts, experts=experts))
    return spec


class WholeDispatcher(MoETokenDispatcher):
    """Gives the experts all tokens as they are, and where they go."""

    routing: Routing | None = None

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [..., hidden] -> [t, hidden]; routing_map bool[t, experts]."""
        self.shape = tokens.shape
        self.routing = Routing.from_map(routing_map, self.config.moe_router_topk)
        return tokens.view(-1, tokens.size(-1)), probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing: every expert is here."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Routing | None, torch.Tensor]:
        """What the experts are called with."""
        routing = self.routing
        self.routing = None
        return hidden_states, routing, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing: the experts have summed up."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing: every expert is here."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[t, hidden] -> [..., hidden]."""
        return hidden_states.view(self.shape)


class LocalMixture(MoELayer):
    """Megatron's mixture of experts, of which no token leaves the process."""

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(*args, pg_collection=groups, **kwargs)
        self.token_dispatcher = WholeDispatcher(self.config, groups)


class GroupedExperts(TEGroupedMLP):
    """Megatron's grouped experts, frozen, their weights views of one tensor for each matrix."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for linear in (self.linear_fc1, self.linear_fc2):
            stack(linear)

    def forward(self, tokens: torch.Tensor, routing: Routing, probabilities: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[t, hidden] -> the weighted sum of each token's experts [t, hidden], and no bias.

        Args:
            tokens: [t, hidden].
            routing: where they go.
            probabilities: [t, experts].
        """
        first, second = self.linear_fc1, self.linear_fc2
        adapted = is_adapted(second)
        added = None
        if is_adapted(first):
            added = adapter_output(first, tokens)
        both = weights_of(first), weights_of(second)
        y, total = frozen_experts(tokens, probabilities, added, *both, routing, with_sum=adapted)
        if total is not None:
            y = y + adapter_output(second, total)
        return y, None

    def quantise(self) -> None:
        """Keep the frozen weights in E4M3 with a scale per expert and output from now on."""
        for linear in (self.linear_fc1, self.linear_fc2):
            base = base_of(linear)
            eight, scale = quantise(base.stacked.view(-1, base.stacked.size(-1)))
            base.stacked_scale = scale.view(base.stacked.shape[:2])
            place(base, eight.view(base.stacked.shape))


def grouped_experts(model: list[torch.nn.Module]) -> list[GroupedExperts]:
    """The experts of a model's parts that are computed as grouped products, a layer's each."""
    return [module for part in model for module in part.modules() if isinstance(module, GroupedExperts)]


def is_adapted(linear: torch.nn.Module) -> bool:
    """Whether an adapter is added to a layer."""
    return isinstance(linear, AdapterWrapper) and linear._adapter_enabled


def base_of(linear: torch.nn.Module) -> Any:
    """The layer itself, Transformer Engine's GroupedLinear, with or without an adapter around it."""
    return linear.to_wrap if isinstance(linear, AdapterWrapper) else linear


def adapter_output(linear: AdapterWrapper, x: torch.Tensor) -> torch.Tensor:
    """LoRA's product, [t, in] -> [t, out]."""
    adapter = linear.adapter
    low = F.linear(x, adapter.linear_in.weight) * (adapter.alpha / adapter.dim)
    return F.linear(low, adapter.linear_out.weight)


def weights_of(linear: torch.nn.Module) -> ExpertWeights:
    """The weights of all experts."""
    base = base_of(linear)
    if base.weight0.data_ptr() != base.stacked.data_ptr():  # something has given the parameters memory of their own
        stack(base)
    return ExpertWeights(base.stacked, getattr(base, "stacked_scale", None))


@torch.no_grad()
def stack(base: Any) -> None:
    """Put the weights weight0, weight1, ... [out, in] of a layer into one tensor."""
    place(base, torch.stack([weight.data for weight in weights(base)]))


def place(base: Any, stacked: torch.Tensor) -> None:
    """Make the weights of a layer views of `stacked` [experts, out, in]."""
    base.stacked = stacked
    for weight, part in zip(weights(base), stacked, strict=True):
        weight.data = part


def weights(base: Any) -> list[torch.nn.Parameter]:
    """The weights of a layer, an expert's each."""
    return [getattr(base, f"weight{number}") for number in range(base.num_gemms)]
