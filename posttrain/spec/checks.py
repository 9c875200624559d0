"""What can be known to be wrong before anything heavy is imported or a GPU is asked for.

Each check raises `UserError` naming the key, the value, and what would be right.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain import patches
from posttrain.config import schema, secrets, targets
from posttrain.config.instantiate import built
from posttrain.data import checks as data_checks
from posttrain.data.training_data import TrainingData
from posttrain.errors import UserError
from posttrain.models.config_checks import check_length, check_wide_heads
from posttrain.models.families import (
    experts_of,
    family_of,
    head_width_of,
    score_softcap_of,
)
from posttrain.models.hf import HFModel
from posttrain.spec import model_checks
from posttrain.spec.megatron_keys import check_own_keys
from posttrain.spec.parallel_sizes import FARTHEST, KEYS, Counts, ParallelSizes, ProcessCount, model_parallel_sizes
from posttrain.spec.resolve import AUTO, has_validation, resolve_spec
from posttrain.spec.schedule import schedule_of
from posttrain.spec.stages import check_stages
from posttrain.utils.gpus import Gpu, oldest_gpu

DOUBLE_BUFFERS = ("fsdp_double_buffer", "megatron_fsdp_max_pool_double_buffer", "nccl_ub")  # of Megatron's `ddp`
# Of a mean square in bf16, whose numbers are up to 1/128 of themselves apart: a change by less than half of that is
# lost, and one by 1/50 is off by at most a fifth of itself.
LARGEST_BETA2 = 0.98
DIVIDED = "optim_grads_params"  # Megatron-FSDP's word for all of weights, gradients and the optimizer's state


def check(cfg: DictConfig, visible_gpus: int) -> Mapping[str, Any] | None:
    """Run every check.

    Args:
        cfg: the composed configuration.
        visible_gpus: GPUs of this machine; 0 on a CPU.

    Returns:
        The model's architecture, see `model_checks.architecture`.

    Raises:
        UserError: the first thing found wrong.
    """
    shape = check_settings(cfg, visible_gpus)
    check_parallelism(cfg, visible_gpus, shape, process_count(cfg, visible_gpus))
    return shape


def check_settings(
    cfg: DictConfig, visible_gpus: int, elsewhere: bool = False, gpu: Gpu | None = None
) -> Mapping[str, Any] | None:
    """Every check but that of the parallel sizes; see `check`.

    Args:
        cfg: as composed.
        visible_gpus: of a machine.
        elsewhere: whether that is another machine, on which Transformer Engine is expected.
        gpu: what each of them is; None: looked up where it matters, and not known elsewhere.
    """
    platform = patches.Platform.with_gpus(visible_gpus)
    patches.check(platform)
    check_keys(cfg)
    targets.check(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"`{missing[0]}`: has no value; give it on the command line or in your configuration")
    secrets.check(cfg)
    check_own_keys(cfg.trainer.megatron)
    check_ranges(cfg)
    rows, _ = data_checks.check(cfg)
    check_objective(cfg, rows)
    model_checks.check_model(cfg)
    shape = model_checks.architecture(cfg.model)
    model_checks.check_peft(cfg, shape)
    check_trainer(cfg, visible_gpus)
    if elsewhere and visible_gpus:
        platform = patches.Platform("cuda", transformer_engine=True)
    if gpu is None and not elsewhere and cfg.precision.name == "fp8":
        gpu = oldest_gpu()
    check_spec(cfg, world_size(cfg, visible_gpus), platform, shape, gpu)
    return shape


def check_trackers(cfg: DictConfig) -> None:
    """Let each tracker refuse before a run what it can know, such as that there is no account."""
    for name, tracker in cfg.logger.items():
        built(tracker, f"logger.{name}").check()


def check_hub(cfg: DictConfig) -> None:
    """Ask the hub, within seconds, whether what the run needs of it is there for this user."""
    model, data = built(cfg.model), built(cfg.data)
    if isinstance(model, HFModel):
        model.check_hub()
    if isinstance(data, TrainingData):
        data_checks.check_hub(data)


def check_keys(cfg: DictConfig) -> None:
    """No setting that the chosen group ignores."""
    for name, tracker in cfg.logger.items():
        if not isinstance(tracker, DictConfig) or tracker.get("_target_") is None:
            raise UserError(
                f"`logger.{name}`: is no tracker, which is a mapping with a `_target_`; choose one with "
                "logger=[wandb,tensorboard]"
            )
    plain = schema.PeftSchema()
    ignored = set()
    if cfg.peft._target_ is None:
        ignored = {field.name for field in fields(plain)} - {"_target_"}
    elif cfg.peft._target_.endswith("DoRA"):
        ignored = {"rslora", "fused", "recompute_norms"}
    for name in sorted(ignored):
        if cfg.peft[name] != getattr(plain, name):
            raise UserError(f"`peft.{name}`: has no effect with this `peft=`; choose peft=lora or remove it")


def check_ranges(cfg: DictConfig, config: type = schema.Config) -> None:
    """Every value inside the limits that its schema field states."""
    schema.check(cfg, schema.limits(config))


def check_objective(cfg: DictConfig, data: TrainingData) -> None:
    """Objective, template and data, which `cfg.data` builds, go together."""
    objective = built(cfg.objective, "objective")
    objective.check(data, cfg.trainer.seq_length)
    name = cfg.template.get("name")
    if name not in (None, "model") and objective.template(built(cfg.template)) is None:
        raise UserError(
            f"`template={name}`: has no effect with this objective, which renders no conversations: the export keeps "
            "the model's own template. Remove it"
        )


def check_trainer(cfg: DictConfig, visible_gpus: int) -> None:
    """Settings of the loop that exclude or need each other."""
    t, s, launch = cfg.trainer, cfg.scheduler, cfg.launch
    if t.max_steps is not None and t.epochs is not None:
        raise UserError("`trainer.max_steps` and `trainer.epochs`: give one of them, set the other to null")
    if s.lr_warmup_fraction is not None and s.lr_warmup_iters:
        raise UserError(
            "`scheduler.lr_warmup_iters`: lr_warmup_fraction is set as well; add scheduler.lr_warmup_fraction=null"
        )
    if t.recompute_layers is not None and t.recompute != "full":
        raise UserError(
            f"`trainer.recompute_layers={t.recompute_layers}`: has no effect with trainer.recompute={t.recompute}; add "
            "trainer.recompute=full, or remove it"
        )
    if t.max_steps is not None:
        schedule_of(cfg, t.max_steps)
    if t.loss_spike_factor is not None and t.on_nonfinite == "skip":
        raise UserError(
            f"`trainer.loss_spike_factor={t.loss_spike_factor}`: a loss is known after the update, too late to skip "
            "it; choose trainer.on_nonfinite=rollback or stop"
        )
    check_bf16_moments(cfg.optimizer)
    if cfg.optimizer.min_lr > cfg.optimizer.lr:
        raise UserError(f"`optimizer.min_lr={cfg.optimizer.min_lr}`: above optimizer.lr={cfg.optimizer.lr}")
    if cfg.parallelism.auto and cfg.parallelism.fsdp:
        raise UserError(
            "`parallelism=auto parallelism.fsdp=true`: Megatron-FSDP is for data-parallel processes alone, so "
            "nothing is left to choose; use parallelism=fsdp"
        )
    if cfg.checkpoint.async_save and cfg.parallelism.fsdp:
        raise UserError("`checkpoint.async_save=true`: Megatron-FSDP's checkpoints are written while training waits")
    if cfg.checkpoint.async_save and not visible_gpus:
        raise UserError("`checkpoint.async_save=true`: needs a GPU, its background writer does not work on a CPU")
    if cfg.precision.name == "fp8" and not visible_gpus:
        raise UserError(
            "`precision=fp8`: needs an Ada, Hopper or newer GPU, and there is none here; use precision=auto"
        )
    check_validated(cfg)
    if t.generation_interval and not t.num_generations:
        raise UserError("`trainer.generation_interval`: trainer.num_generations=0 leaves no prompts to answer")
    if launch.node_rank >= launch.nnodes:
        raise UserError(f"`launch.node_rank={launch.node_rank}`: must be below launch.nnodes={launch.nnodes}")
    if launch.nnodes > 1 and launch.master_port is None:
        raise UserError("`launch.master_port`: needs a number when launch.nnodes > 1, the same on every machine")


def check_bf16_moments(optimizer: DictConfig) -> None:
    """Moments in bf16 decay by more than is lost when they are rounded.

    Raises:
        UserError: they don't.
    """
    beta2 = optimizer.get("adam_beta2", 0.0)
    if optimizer.get("use_precision_aware_optimizer") and beta2 > LARGEST_BETA2:
        raise UserError(
            f"`optimizer.adam_beta2={beta2}`: with moments in bf16 (optimizer.use_precision_aware_optimizer=true) at "
            f"most {LARGEST_BETA2}, since a mean square that falls by less in a step is rounded back to what it was; "
            "use 0.95, or optimizer=adam"
        )


def check_validated(cfg: DictConfig) -> None:
    """What compares validation losses during training has some."""
    patience = cfg.trainer.early_stopping.patience
    comparing = {
        "sweep.pruner": cfg.sweep.pruner,
        "trainer.early_stopping.patience": patience,
        "trainer.export": cfg.trainer.export if cfg.trainer.export == "best" else None,
        "checkpoint.keep_best": "true" if cfg.checkpoint.keep_best else None,
    }
    for key, value in comparing.items():
        if value is None:
            continue
        if not has_validation(cfg.data):
            raise UserError(
                f"`{key}={value}`: compares validation losses, and there is no validation set; set "
                "data.validation_fraction or data.validation_path"
            )
        if cfg.trainer.validation_interval is None:
            raise UserError(f"`{key}={value}`: compares losses during training; set trainer.validation_interval")
    if cfg.trainer.export == "best" and not cfg.checkpoint.save:
        raise UserError(
            "`trainer.export=best`: the best weights are kept in a checkpoint; remove checkpoint.save=false, or choose "
            "trainer.export=last"
        )


def check_spec(
    cfg: DictConfig, world: int, platform: patches.Platform, shape: Mapping[str, Any] | None, gpu: Gpu | None = None
) -> None:
    """What was asked for and depends on the whole run can be done: a captured step, activations on the host, few bits.

    So can the number of layers that are computed again. Of a model whose architecture is unknown yet, on a hub, the run
    itself says what depends on its layers, and of 8 bits what experts need.

    Args:
        cfg: as composed.
        world: processes over all machines.
        platform: of the run.
        shape: see `model_checks.architecture`.
        gpu: what each process runs on; None: not known.
    """
    eight_bit = cfg.precision.name == "fp8" and (gpu is not None or cfg.parallelism.fsdp)
    trainer = cfg.trainer
    bf16_state = cfg.optimizer.get("use_precision_aware_optimizer")
    if not (trainer.cuda_graph or trainer.offload_layers or trainer.recompute_layers or eight_bit or bf16_state):
        return
    if cfg.trainer.micro_batch_size == AUTO:
        cfg = cfg.copy()
        cfg.trainer.micro_batch_size = 1  # the least that it becomes
    spec = resolve_spec(cfg, world, platform.transformer_engine, platform.device, shape or {})
    if shape is None:
        spec = replace(spec, offload_layers=None)
    spec.check()
    if gpu is not None and spec.precision == "fp8":
        gpu.check_eight_bit(grouped=spec.eight_bit_experts)


def check_parallelism(
    cfg: DictConfig, visible_gpus: int, shape: Mapping[str, Any] | None, count: ProcessCount | None = None
) -> None:
    """Batch by data-parallel size, and the model's shape by the parallel sizes.

    Args:
        cfg: with plain parallel sizes.
        visible_gpus: of a machine.
        shape: see `model_checks.architecture`.
        count: what an error says of the number of processes, see `process_count`; None: nothing, it is being searched.
    """
    nproc = nproc_per_node(cfg, visible_gpus)
    sizes = ParallelSizes(world=nproc * cfg.launch.nnodes, **model_parallel_sizes(cfg))
    _check_together(cfg, visible_gpus, sizes)
    if visible_gpus and nproc > visible_gpus:
        raise UserError(f"`parallelism.nproc_per_node={nproc}`: this machine has {visible_gpus} visible GPUs")
    _check_divisible(cfg, sizes, count)
    if shape is not None:
        _check_shape(cfg, shape, sizes)


def _check_together(cfg: DictConfig, visible_gpus: int, sizes: ParallelSizes) -> None:
    """What goes together with the parallel sizes, whatever their numbers."""
    chosen = cfg.parallelism
    interval = cfg.trainer.generation_interval
    if interval and not sizes.whole_in_one:
        raise UserError(
            f"`trainer.generation_interval={interval}`: needs all layers and whole sequences in one "
            "process, not pipeline or context parallelism; leave it out, and ask the run's checkpoints: "
            "python -m posttrain.generate"
        )
    if not visible_gpus and sizes.context > 1:
        raise UserError(
            f"`parallelism.context_parallel_size={sizes.context}`: its attention is Transformer Engine's, which needs "
            "GPUs; use tensor or pipeline parallelism"
        )
    if chosen.fsdp and max(sizes.model_parallel, sizes.expert) > 1:
        raise UserError(
            "`parallelism.fsdp`: is for data-parallel processes alone; set tensor_model_parallel_size, "
            "pipeline_model_parallel_size, context_parallel_size and expert_model_parallel_size of parallelism to 1"
        )
    if chosen.fsdp and cfg.precision.name == "fp8" and cfg.peft._target_ is not None:
        check_eight_bit_fsdp(cfg.trainer.megatron.get("ddp", {}))
    if (chosen.distributed_optimizer or chosen.fsdp) and cfg.optimizer.optimizer != "adam":
        raise UserError(
            f"`optimizer.optimizer={cfg.optimizer.optimizer}`: Megatron divides Adam's state alone over processes; use "
            "optimizer=adam, or a layout without parallelism.distributed_optimizer and parallelism.fsdp"
        )


def _check_divisible(cfg: DictConfig, sizes: ParallelSizes, count: ProcessCount | None) -> None:
    """The processes can be divided by the sizes, and batch and sequences by the processes."""
    t = cfg.trainer
    if sizes.world % sizes.model_parallel:
        raise UserError(
            f"`parallelism`: {sizes.world} processes can't be divided into groups of tensor x pipeline x context = "
            f"{sizes.tensor} x {sizes.pipeline} x {sizes.context} = {sizes.model_parallel}{_advice(cfg, sizes, count)}"
        )
    at_once = t.micro_batch_size * sizes.data_parallel
    if t.global_batch_size % at_once:
        nearest = max(1, round(t.global_batch_size / at_once)) * at_once
        advice = _advice(cfg, sizes, count, f"trainer.global_batch_size={nearest}")
        raise UserError(
            f"`trainer.global_batch_size={t.global_batch_size}`: must be a multiple of micro_batch_size x "
            f"data-parallel size = {t.micro_batch_size} x {sizes.data_parallel} = {at_once}{advice}"
        )
    # Experts are whole: the processes of tensor parallelism hold different ones.
    holders = sizes.world // sizes.pipeline
    if holders % sizes.expert:
        raise UserError(
            f"`parallelism.expert_model_parallel_size={sizes.expert}`: must divide data x context x tensor parallel "
            f"size {holders}{_advice(cfg, sizes, count)}"
        )
    check_sequences(t.seq_length, sizes)


def check_sequences(seq_length: int, sizes: ParallelSizes) -> None:
    """Whether sequences can be divided among processes.

    Raises:
        UserError: they can't.
    """
    if seq_length % sizes.micro_batch_multiple:
        multiple = f"tensor_model_parallel_size={sizes.tensor}"
        if sizes.context > 1:
            multiple = "tensor x 2 x context parallel size"
        raise UserError(f"`trainer.seq_length={seq_length}`: must be a multiple of {multiple}")


def check_eight_bit_fsdp(section: Mapping[str, Any]) -> None:
    """Megatron-FSDP divides weights in 8 bits, and gathers each layer's into the same memory, forward and backward.

    A layer's backward pass reads them where its forward pass has found them.

    Args:
        section: `trainer.megatron.ddp`.
    """
    for key in DOUBLE_BUFFERS:
        if section.get(key):
            raise UserError(
                f"`trainer.megatron.ddp.{key}`: layers would share buffers, and the backward pass reads frozen weights "
                "in 8 bits where the forward pass has; leave it out, or use precision=bf16"
            )
    strategy = section.get("data_parallel_sharding_strategy", DIVIDED)
    if strategy != DIVIDED:
        raise UserError(
            f"`trainer.megatron.ddp.data_parallel_sharding_strategy={strategy}`: frozen weights in 8 bits are read "
            f"into divided ones; leave it out ({DIVIDED}), or use precision=bf16"
        )


def _advice(cfg: DictConfig, sizes: ParallelSizes, count: ProcessCount | None, *overrides: str) -> str:
    """The end of an error that depends on the number of processes: where it comes from, and which settings would do.

    Args:
        cfg: with plain parallel sizes.
        sizes: that are refused.
        count: of processes; None: there is nothing to say.
        overrides: that would do besides another number of processes.
    """
    if count is None:
        return ""
    nnodes = cfg.launch.nnodes
    other = count.nearest(lambda nproc: _divisible(cfg, replace(sizes, world=nproc * nnodes)))
    settings = list(overrides)
    if other is not None:
        settings.append(f"{count.key}={other}")
    advice = "change the sizes in parallelism, or the batch"
    if settings:
        advice = f"{' or '.join(settings)} would do"
    source = count.source
    if nnodes > 1:
        source += f", on each of launch.nnodes={nnodes}"
    what = "1 process" if sizes.world == 1 else f"{sizes.world} processes"
    return f" ({what}: {source}); {advice}"


def _divisible(cfg: DictConfig, sizes: ParallelSizes) -> bool:
    """Whether the processes can be divided by the parallel sizes, and the batch by them."""
    if sizes.world % sizes.model_parallel or sizes.world // sizes.pipeline % sizes.expert:
        return False
    at_once: int = cfg.trainer.micro_batch_size * sizes.data_parallel
    left: int = cfg.trainer.global_batch_size % at_once
    return left == 0


def _check_shape(cfg: DictConfig, shape: Mapping[str, Any], sizes: ParallelSizes) -> None:
    """What the architecture, fields of its config.json, says against the parallel sizes and the sequences' length."""
    family = family_of(shape)
    if family is not None:
        _check_counts(Counts.from_config(family, shape), sizes)
        layers = family.value("layers", shape)
        if layers is not None:
            check_stages(cfg.trainer.megatron, layers, sizes.pipeline, cfg.trainer.recompute_layers)
    elif max(sizes.tensor, sizes.pipeline, sizes.expert) > 1:
        kind = shape.get("model_type")
        print(
            f"posttrain: model_type {kind!r} is not known here, so only Megatron can tell whether its layers, "
            "heads and experts can be divided by the parallel sizes",
            file=sys.stderr,
        )
    check_length(shape, cfg.trainer.seq_length)
    if score_softcap_of(shape) is not None and sizes.context > 1:
        raise UserError(
            f"`parallelism.context_parallel_size={sizes.context}`: this model's attention scores are soft-capped, "
            "and no such attention divides a sequence over processes; use tensor or pipeline parallelism"
        )
    check_wide_heads(head_width_of(shape), sizes.context, dropout=0.0)
    if experts_of(shape) and sizes.tensor > 1 and cfg.parallelism.sequence_parallel is False:
        raise UserError(
            "`parallelism.sequence_parallel=false`: a mixture of experts with tensor parallelism needs it; "
            "set it to null"
        )


def _check_counts(counts: Counts, sizes: ParallelSizes) -> None:
    """The architecture's counts by the parallel sizes."""
    for what, count, name in counts.undivided(sizes):
        possible = [str(size) for size in range(1, 65) if count % size == 0]
        raise UserError(
            f"`parallelism.{KEYS[name]}={getattr(sizes, name)}`: the model's {count} {what} can't be divided by it; "
            f"possible: {', '.join(possible)}"
        )
    if sizes.expert > 1 and counts.experts is None:
        raise UserError(f"`parallelism.expert_model_parallel_size={sizes.expert}`: this model has no experts")


def nproc_per_node(cfg: DictConfig, visible_gpus: int) -> int:
    """Processes on this machine: as told, else one per visible GPU, else the fewest that the parallel sizes need."""
    given: int | None = cfg.parallelism.nproc_per_node
    if given is not None:
        return given
    if visible_gpus:
        return visible_gpus
    nnodes: int = cfg.launch.nnodes
    sizes = ParallelSizes(world=1, **model_parallel_sizes(cfg))
    return max(1, sizes.fewest // nnodes)


def process_count(cfg: DictConfig, visible_gpus: int, setting: str | None = None) -> ProcessCount:
    """Where the number of processes on each machine comes from.

    Args:
        cfg: as composed.
        visible_gpus: of a machine.
        setting: what decides it besides the configuration, e.g. hydra.launcher.gpus_per_node; None: nothing does.
    """
    nproc = nproc_per_node(cfg, visible_gpus)
    if setting:
        return ProcessCount(nproc, setting, f"{setting}={nproc}")
    key = "parallelism.nproc_per_node"
    source = "on a CPU as few as the sizes in parallelism need"
    if cfg.parallelism.nproc_per_node is not None:
        source = f"{key}={nproc}"
    elif visible_gpus:
        source = f"one for each of {visible_gpus} visible GPUs"
    return ProcessCount(nproc, key, source, most=visible_gpus or FARTHEST)


def world_size(cfg: DictConfig, visible_gpus: int) -> int:
    """Processes over all machines."""
    nnodes: int = cfg.launch.nnodes
    return nproc_per_node(cfg, visible_gpus) * nnodes
