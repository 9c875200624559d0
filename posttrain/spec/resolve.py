"""From a checked configuration to a run's specification."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from posttrain.config.instantiate import built
from posttrain.models.families import experts_of, family_of
from posttrain.peft.adapters import DoRA, LoRA
from posttrain.spec.parallel_sizes import model_parallel_sizes
from posttrain.spec.run_spec import RunSpec
from posttrain.spec.shape import Adapters, Shape, config_of
from posttrain.spec.stages import own_options

AUTO = "auto"  # leaves a value to posttrain.plan.auto


def resolve_spec(
    cfg: DictConfig,
    world: int,
    transformer_engine: bool = True,
    device: str = "cuda",
    config: Mapping[str, Any] | None = None,
) -> RunSpec:
    """The specification of a checked configuration.

    Args:
        cfg: with plain parallel sizes and micro-batch size.
        world: processes over all machines.
        transformer_engine: whether it is installed where the run will be.
        device: "cpu" or "cuda".
        config: fields of the model's config.json, of any family; None: they are looked up, and the family has to be
            known, since estimates are made of the model's sizes.

    Raises:
        UserError: `config` is None and the model's sizes are not known.
    """
    fields = config_of(built(cfg.model)) if config is None else config
    family = family_of(fields)
    shape = Shape.from_config(fields) if family is not None or config is None else None
    experts = experts_of(fields)
    trainer, sizes = cfg.trainer, cfg.parallelism
    adapter: LoRA | None = built(cfg.peft) if cfg.peft._target_ else None
    adapters = None
    if adapter is not None and shape is not None:
        kind = "DoRA" if isinstance(adapter, DoRA) else "LoRA"
        adapters = Adapters.from_targets(shape, kind, adapter.rank, adapter.target_modules, transformer_engine)
    recompute, recompute_open = read_recompute(trainer.recompute)
    sequence_parallel = sizes.sequence_parallel
    if sequence_parallel is None:  # Megatron trains experts under tensor parallelism with it only
        sequence_parallel = transformer_engine or experts > 0
    no_cuda_graph: str | None = "the captured step of this family has not been compared with the plain one"
    if family is not None:
        no_cuda_graph = family.no_cuda_graph
    return RunSpec(
        device=device,
        transformer_engine=transformer_engine,
        shape=shape,
        experts=experts,
        mixture_settings=changes_mixture(trainer.megatron),
        stage_options=own_options(trainer.megatron),
        no_cuda_graph=no_cuda_graph,
        adapter=adapter is not None,
        adapters=adapters,
        every_layer_fused=adapter is not None and adapter.every_layer_fused,
        precision=built(cfg.precision).resolve(device),
        world=world,
        **model_parallel_sizes(cfg),
        sequence_parallel=bool(sequence_parallel),
        overlap=sizes.overlap,
        distributed_optimizer=sizes.distributed_optimizer,
        fsdp=sizes.fsdp,
        micro_batch=trainer.micro_batch_size,
        global_batch=trainer.global_batch_size,
        max_steps=trainer.max_steps,
        epochs=trainer.epochs,
        validation_batches=trainer.validation_batches,
        length=trainer.seq_length,
        recompute=recompute,
        recompute_open=recompute_open,
        recompute_layers=trainer.recompute_layers,
        offload_layers=trainer.offload_layers,
        optimizer=cfg.optimizer.optimizer,
        bf16_state=bool(cfg.optimizer.get("use_precision_aware_optimizer")),
        machines=cfg.launch.nnodes,
        packing=bool(cfg.data.get("packing", True)),
        fused=adapter is not None and adapter.fused,
        recompute_norms=adapter is not None and adapter.recompute_norms,
        dropout=adapter.dropout if adapter is not None else 0.0,
        answers=trainer.num_generations if has_validation(cfg.data) else 0,
        skip_prompt_logits=trainer.skip_prompt_logits,
        graph=trainer.cuda_graph,
        export=bool(trainer.export),
        verify=trainer.verify,
        verify_base=trainer.verify_base,
    )


def read_recompute(given: str) -> tuple[str, bool]:
    """`recompute` and `recompute_open` of a RunSpec: `trainer.recompute=auto` is none, and open to change."""
    if given == AUTO:
        return "none", True
    return given, False


def has_validation(data: Mapping[str, Any]) -> bool:
    """Whether rows are held out of the training, or a file has them."""
    return data.get("validation_path") is not None or data.get("validation_fraction") is not None


def changes_mixture(sections: Mapping[str, Any]) -> bool:
    """Whether `trainer.megatron` sets anything of Megatron's that begins with moe_."""
    return any(key.startswith("moe_") for key in sections.get("model", {}))
