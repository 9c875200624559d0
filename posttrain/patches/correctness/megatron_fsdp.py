"""Checkpoints under Megatron-FSDP."""

from types import ModuleType
from typing import TYPE_CHECKING

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, patch, replace

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

VERSIONS = {"megatron-core": ">=0.19,<0.20"}


def _look_behind_wrappers(module: ModuleType) -> None:
    def find(self: "MegatronFSDP", target: str) -> "torch.nn.Parameter":
        plain = self.module
        while "module" in dict(plain.named_children()):
            plain = plain.module
        while target.startswith("module."):
            target = target.removeprefix("module.")
        return plain.get_parameter(target)

    replace(module.MegatronFSDP, get_parameter=find)


@patch(
    "fsdp-parameter-names",
    kind=Kind.CORRECTNESS,
    symptom="a run in fp32 under Megatron-FSDP can't save: gated matrices are looked for behind the wrapper of bf16",
    versions=VERSIONS,
)
def find_parameters() -> None:
    """Find a parameter by its name in the plain model, however many wrappers are around it."""
    on_import("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp", _look_behind_wrappers)


def _complete_state(module: ModuleType) -> None:
    import torch
    from torch.distributed.tensor import DTensor

    optimizer = module.DistributedOptimizer
    plain = optimizer.sharded_param_state_fsdp_dtensor

    def empty(parameter: "torch.Tensor", like: dict[str, object]) -> dict[str, object]:
        """Without numbers; the steps that it counts are those of another parameter."""
        state = {}
        for name, value in like.items():
            state[name] = torch.zeros_like(parameter) if isinstance(value, DTensor) else value
        return state

    def has_part(parameter: "torch.Tensor") -> bool:
        return not isinstance(parameter, DTensor) or parameter.to_local().numel() > 0

    def complete(self: "DistributedOptimizer", is_loading: bool = False) -> dict[str, object]:
        state_dict = plain(self, is_loading)
        known: dict[str, dict[str, object]] = state_dict["state"]
        parameters: dict[str, torch.Tensor] = {}
        for group in self.optimizer.param_groups:
            parameters |= {self._param_name(parameter): parameter for parameter in group["params"]}
        held = {name: known[name] for name, parameter in parameters.items() if name in known and has_part(parameter)}
        like = next(iter(held.values()), {})
        states = {}
        for name, parameter in parameters.items():
            states[name] = held.get(name) or empty(parameter, like)
        state_dict["state"] = states
        return state_dict

    replace(optimizer, sharded_param_state_fsdp_dtensor=complete)


@patch(
    "fsdp-empty-shards",
    kind=Kind.CORRECTNESS,
    symptom="a save under Megatron-FSDP hangs: a process without numbers of a parameter has no state of it to save",
    versions=VERSIONS,
)
def complete_state() -> None:
    """Have every process name the state of every parameter, in one order; of those without numbers it is empty."""
    on_import("megatron.core.optimizer.distrib_optimizer", _complete_state)
