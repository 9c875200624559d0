"""A mixture's layer whose experts are frozen: grouped products (posttrain.ops.divided_experts).

Upstream's layer sorts tokens by expert and asks the device how many each expert got, so its host waits in every layer
and its step can't be captured. Here its router and its order of calls stay; the dispatcher hands over the tokens as
they are and where they go, and the experts do the rest, the exchange of expert parallelism included. Parameters, their
names and adapters are upstream's, and so is the reduction of gradients: of an adapter that a layer's experts share, a
hook of upstream's sums each process's part over the processes that the experts are divided over, then its
data-parallel reduction over those that have the same experts.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec

from posttrain.ops.divided_experts import SharedAdapter, adapted_experts, exchange_of
from posttrain.ops.fp8_linear import EightBitWeight
from posttrain.ops.grouped_experts import ExpertWeights


def grouped_layer_spec(config: GPTModelProvider, eight_bit: bool = False) -> ModuleSpec:
    """Upstream's layers of a mixture with Transformer Engine, with this mixture in them.

    Args:
        config: of the model.
        eight_bit: whether the experts are kept in 8 bits.
    """
    spec = default_layer_spec(config)
    parts = spec.submodules.mlp.keywords["submodules"]
    experts = partial(GroupedExperts, **parts.experts.keywords, eight_bit=eight_bit)
    spec.submodules.mlp = partial(GroupedMixture, submodules=dataclasses.replace(parts, experts=experts))
    return spec


class WholeDispatcher(MoETokenDispatcher):
    """Gives the experts all tokens as they are, and where they go."""

    chosen: torch.Tensor | None = None

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [..., hidden] -> [t, hidden]; routing_map bool[t, experts]."""
        self.shape = tokens.shape
        self.chosen = routing_map
        return tokens.view(-1, tokens.size(-1)), probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing: the experts gather what they need."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What the experts are called with."""
        chosen = self.chosen
        self.chosen = None
        return hidden_states, chosen, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing: the experts have summed up."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing: the experts have sent the sums back."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[t, hidden] -> [..., hidden]."""
        return hidden_states.view(self.shape)


class GroupedMixture(MoELayer):
    """Megatron's mixture of experts, with experts that do the dispatcher's work."""

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(*args, pg_collection=groups, **kwargs)
        self.token_dispatcher = WholeDispatcher(self.config, groups)


class GroupedExperts(TEGroupedMLP):
    """Megatron's grouped experts, frozen, their weights views of one tensor for each matrix.

    Attributes:
        exchange: between the processes that a layer's experts are divided over.
    """

    def __init__(self, *args: Any, eight_bit: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange = exchange_of(self.ep_group)
        for linear in (self.linear_fc1, self.linear_fc2):
            if eight_bit:
                keep_in_eight_bits(linear)
            else:
                stack(linear)

    def forward(
        self, tokens: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[t, hidden] -> the weighted sum of each token's experts [t, hidden], and no bias.

        Args:
            tokens: [t, hidden].
            chosen: bool[t, all experts], where they go.
            probabilities: [t, all experts].
        """
        first, second = self.linear_fc1, self.linear_fc2
        y = adapted_experts(
            tokens,
            probabilities,
            chosen,
            self.config.moe_router_topk,
            (weights_of(first), weights_of(second)),
            (adapter_of(first), adapter_of(second)),
            self.exchange,
        )
        return y, None


def adapter_of(linear: torch.nn.Module) -> SharedAdapter | None:
    """The adapter that is added to a layer; None: there is none, or it is disabled."""
    if not isinstance(linear, AdapterWrapper) or not linear._adapter_enabled:
        return None
    adapter = linear.adapter
    return SharedAdapter(adapter.linear_in.weight, adapter.linear_out.weight, adapter.alpha / adapter.dim)


def base_of(linear: torch.nn.Module) -> Any:
    """The layer itself, Transformer Engine's GroupedLinear, with or without an adapter around it."""
    return linear.to_wrap if isinstance(linear, AdapterWrapper) else linear


def weights_of(linear: torch.nn.Module) -> ExpertWeights:
    """The weights of all experts."""
    base = base_of(linear)
    scale = getattr(base, "stacked_scale", None)
    if scale is not None:
        return ExpertWeights(base.stacked.view(torch.float8_e4m3fn), scale)
    if base.weight0.data_ptr() != base.stacked.data_ptr():  # something has given the parameters memory of their own
        stack(base)
    return ExpertWeights(base.stacked)


@torch.no_grad()
def stack(base: Any) -> None:
    """Put the weights weight0, weight1, ... [out, in] of a layer into one tensor, of which they are views then."""
    weights = [getattr(base, f"weight{number}") for number in range(base.num_gemms)]
    base.stacked = torch.stack([weight.data for weight in weights])
    for weight, part in zip(weights, base.stacked, strict=True):
        weight.data = part


def keep_in_eight_bits(base: Any) -> None:
    """Replace the weights of a layer, not yet filled, by views of one tensor of 8-bit numbers."""
    shape = (base.num_gemms, *base.weight0.shape)
    base.stacked = torch.zeros(shape, dtype=torch.uint8, device=base.weight0.device)
    base.stacked_scale = torch.ones(shape[:2], device=base.weight0.device)
    for number, (numbers, scale) in enumerate(zip(base.stacked, base.stacked_scale, strict=True)):
        former = getattr(base, f"weight{number}")
        setattr(base, f"weight{number}", EightBitWeight.in_place_of(former, numbers, scale))
