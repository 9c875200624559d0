"""How a run is divided over processes. No torch at import."""

from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError
from posttrain.patches import Platform


@dataclass
class Parallelism:
    """The config group `parallelism`; sizes as in Megatron-Core.

    Attributes:
        auto, memory_gib: see posttrain.plan.auto, which replaces them by sizes before the run starts.
        nproc_per_node: processes on this machine; the launcher reads it.
        sequence_parallel: None: with tensor parallelism where Transformer Engine is.
        distributed_optimizer: optimizer state divided over the data-parallel processes (ZeRO 1).
        fsdp: Megatron-FSDP, weights and gradients divided as well (ZeRO 3).
        overlap: hide communication behind computation on a GPU.
    """

    auto: bool = False
    memory_gib: float | None = None
    nproc_per_node: int | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool | None = None
    distributed_optimizer: bool = False
    fsdp: bool = False
    overlap: bool = True

    def apply(self, model: Any, platform: Platform, sequence_parallel: bool) -> None:
        """Set the sizes on a Megatron model provider.

        Args:
            model: the provider.
            platform: where the run is.
            sequence_parallel: as the run's specification has decided.

        Raises:
            UserError: what this platform can't do.
        """
        if self.context_parallel_size > 1 and not platform.transformer_engine:
            raise UserError(
                "parallelism.context_parallel_size: needs Transformer Engine on a GPU (uv sync --extra gpu); "
                "use tensor or pipeline parallelism instead"
            )
        if self.fsdp and platform.device == "cpu":
            raise UserError("parallelism=fsdp: Megatron-FSDP needs GPUs; use parallelism=zero1")
        model.tensor_model_parallel_size = self.tensor_model_parallel_size
        model.pipeline_model_parallel_size = self.pipeline_model_parallel_size
        model.context_parallel_size = self.context_parallel_size
        model.expert_model_parallel_size = self.expert_model_parallel_size
        model.sequence_parallel = sequence_parallel and self.tensor_model_parallel_size > 1

    def ddp(self, platform: Platform) -> Any:
        """Return Megatron's data-parallel configuration: gradients summed, normalised by tokens elsewhere."""
        from megatron.bridge.training.config import DistributedDataParallelConfig

        overlap = self.overlap and platform.device == "cuda" and self.distributed_optimizer
        return DistributedDataParallelConfig(
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            average_in_collective=False,
            check_for_nan_in_grad=True,
            use_megatron_fsdp=self.fsdp,
            data_parallel_sharding_strategy="optim_grads_params" if self.fsdp else "no_shard",
        )

    def dist(self, platform: Platform) -> Any:
        """Return Megatron-Bridge's process-group configuration."""
        from megatron.bridge.training.config import DistributedInitConfig

        return DistributedInitConfig(
            distributed_backend="nccl" if platform.device == "cuda" else "gloo",
            use_gloo_process_groups=platform.device == "cpu" or self.distributed_optimizer,
            use_megatron_fsdp=self.fsdp,
        )
