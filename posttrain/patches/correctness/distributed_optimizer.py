"""The distributed optimizer over torch's own Adam, which Megatron uses without Transformer Engine and Apex."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from posttrain.patches.deferred import on_import
from posttrain.patches.registry import Kind, patch, replace, without_te

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _restore_state(module: ModuleType) -> None:
    """Have the state there before it is asked for its step, and a step of its own for each parameter."""
    import torch

    optimizer = module.DistributedOptimizer
    sharded = optimizer.sharded_state_dict
    load = optimizer.load_state_dict

    def with_state(
        self: "DistributedOptimizer",
        model_sharded_state_dict: dict[str, object],
        is_loading: bool = False,
        *args: object,
        **kwargs: object,
    ) -> dict[str, object]:
        if is_loading and not self.optimizer.state and self.init_state_fn:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.zeros(())
        return sharded(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    def with_own_steps(self: "DistributedOptimizer", state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        if self.ddp_config.use_megatron_fsdp:
            return  # each parameter's step is in the checkpoint
        steps = {group["step"] for group in state_dict["optimizer"]["param_groups"] if "step" in group}
        if not steps:
            return
        # Megatron gives all one tensor, which would count once for each of them, and then copies the state's own there.
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(max(steps)))

    replace(optimizer, sharded_state_dict=with_state, load_state_dict=with_own_steps)


@patch(
    "torch-distributed-optimizer",
    kind=Kind.CORRECTNESS,
    symptom="a checkpoint of the distributed optimizer can't be loaded: its empty state is asked for its step",
    versions={"megatron-core": ">=0.19,<0.20"},
    when=without_te,
)
def restore_distributed_optimizer() -> None:
    """Fill the state before a load, give each parameter its own step after it."""
    on_import("megatron.core.optimizer.distrib_optimizer", _restore_state)
