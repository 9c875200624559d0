"""How a run is divided over processes. No torch at import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.patches import Platform

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider


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

    def apply(self, model: "GPTModelProvider", platform: Platform, sequence_parallel: bool) -> None:
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
        model.tensor_model_parallel_size = self.tensor_model_parallel_size
        model.pipeline_model_parallel_size = self.pipeline_model_parallel_size
        model.context_parallel_size = self.context_parallel_size
        model.expert_model_parallel_size = self.expert_model_parallel_size
        model.sequence_parallel = sequence_parallel and self.tensor_model_parallel_size > 1
        model.batch_p2p_sync = False  # waits for the device at every send, for versions of PyTorch before 2
