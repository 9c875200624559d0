"""A run's specification as its directory keeps it: `spec.yaml`, for whoever wonders what a run decided and why."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain import patches
from posttrain.config import frozen
from posttrain.errors import UserError
from posttrain.spec import checks
from posttrain.spec.resolve import resolve_spec
from posttrain.spec.run_spec import RunSpec

FILE = "spec.yaml"
HEADER = """\
# What this run decided from config.yaml and the machine, and why. Written at each start, read by reports alone: to
# change a decision, change its key.
"""


def specify(cfg: DictConfig, visible_gpus: int, architecture: Mapping[str, Any] | None) -> RunSpec | None:
    """The specification of a checked run here, before its model is read.

    Args:
        cfg: the checked configuration.
        visible_gpus: of this machine; 0: the run is on its CPU.
        architecture: what `checks.check` returned.

    Returns:
        None for a hub id of which nothing has been read, and on a CPU where a config.json leaves out a size.

    Raises:
        UserError: on a GPU, where a size is left out; or no layer is adapted.
    """
    if architecture is None:
        return None
    platform = patches.Platform.with_gpus(visible_gpus)
    world = checks.world_size(cfg, visible_gpus)
    try:
        return resolve_spec(cfg, world, platform.transformer_engine, platform.device, architecture)
    except UserError:
        if visible_gpus:
            raise
        return None  # on a CPU nothing before the model itself depends on it


def format_spec(spec: RunSpec) -> str:
    """The text of spec.yaml."""
    decisions = {}
    for name, decision in spec.decisions().items():
        decisions[name] = {"enabled": decision.on, "reason": decision.reason}
    values = {
        "device": spec.device,
        "transformer_engine": spec.transformer_engine,
        "precision": spec.precision,
        "model": _describe_model(spec),
        "trained": _describe_trained(spec),
        "processes": {
            "world": spec.world,
            "data": spec.data_parallel,
            "tensor": spec.tensor,
            "pipeline": spec.pipeline,
            "stage_layers": list(spec.stages) if spec.stages else None,
            "context": spec.context,
            "expert": spec.expert,
            "sequence_parallel": spec.sequence_parallel and spec.tensor > 1,
            "distributed_optimizer": spec.divides_state,
            "fsdp": spec.fsdp,
        },
        "batch": {
            "packed": spec.packing,
            "sequence_length": spec.length,
            "micro_batch": spec.micro_batch,
            "micro_batches_per_step": spec.micro_batches,
            "global_batch": spec.global_batch,
        },
        "steps": spec.max_steps,
        "epochs": spec.epochs,
        "optimizer": spec.optimizer,
        "bf16_optimizer_state": spec.bf16_state,
        "recompute": spec.recompute,
        "recompute_layers": spec.recompute_layers,
        "offload_layers": spec.offload_layers,
        "layer_and_adapter_are_one_operation": spec.one_operation,
        "decisions": decisions,
    }
    return HEADER + OmegaConf.to_yaml(frozen.literal(values))


def _describe_model(spec: RunSpec) -> dict[str, object] | None:
    if spec.shape is None:
        return None
    return {
        "family": spec.shape.family.model_type,
        "parameters": spec.shape.parameters,
        "layers": spec.shape.layers,
        "hidden": spec.shape.hidden,
        "vocabulary": spec.shape.vocab,
        "experts": spec.experts,
    }


def _describe_trained(spec: RunSpec) -> dict[str, object] | str:
    if not spec.adapter:
        return "all weights"
    if spec.adapters is None:
        return "an adapter"
    return {
        "kind": spec.adapters.kind,
        "rank": spec.adapters.rank,
        "parameters": spec.adapters.parameters,
        "layers": sorted(spec.adapters.sizes),
    }
