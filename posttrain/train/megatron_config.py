"""Megatron-Bridge's whole configuration for a run: the model provider, and the container around it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.training.config import (
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from safetensors.torch import save_file

from posttrain.checkpoint import fingerprints, resume
from posttrain.checkpoint.manager import RunCheckpointConfig, SavedRun
from posttrain.errors import UserError
from posttrain.models import fully_sharded
from posttrain.models.config_checks import check_length
from posttrain.models.eight_bit_layers import eight_bit_layer_spec
from posttrain.models.hf_adapter import read_adapter
from posttrain.models.local_spec import check_expert_names, choose_attention, use_local_layers
from posttrain.models.mixture_layer import grouped_layer_spec
from posttrain.models.offloaded_activations import offload
from posttrain.models.padding import fill_up_as_read, hide_padding, padded_rows
from posttrain.models.whole_parameters import draw_model
from posttrain.peft import adapter_checks, load_adapter
from posttrain.peft.lora_plus import LoRAPlus
from posttrain.spec import inputs
from posttrain.spec.stages import check_stages, format_layout
from posttrain.train.console import shown
from posttrain.train.context import RunContext
from posttrain.train.dataset_provider import RowsProvider
from posttrain.train.run_batches import RunBatches
from posttrain.utils import rundir
from posttrain.utils.gpus import Gpu
from posttrain.utils.suggest import did_you_mean

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.config import SchedulerConfig
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
    from transformers import PretrainedConfig

MIN_TIMEOUT_MINUTES = 10  # of a collective call; the launcher's own limit is usually shorter


@dataclass(frozen=True)
class MegatronModel:
    """What Megatron-Bridge builds a run's model from.

    Attributes:
        bridge: between the model's Hugging Face files and Megatron.
        provider: sizes, precision and layers.
        vocab_size: rows of the embedding, without those that tensor parallelism pads it with.
        peft: the adapter's; None: all weights are trained.
    """

    bridge: "AutoBridge"
    provider: "GPTModelProvider"
    vocab_size: int
    peft: "PEFT | None"


def build_model(run: RunContext) -> MegatronModel:
    """Build the model's provider with this run's sizes, precision and layers, and its adapter.

    Raises:
        UserError: the platform can't do it; the GPU, not known before, has no 8-bit products; fewer layers than
            pipeline stages, in a family whose sizes are not known before; or the run continues an adapter of another
            kind or scale.
    """
    groups = run.groups
    if run.spec.precision == "fp8":
        gpu = Gpu(torch.cuda.get_device_name(), None, 0.0, capability=torch.cuda.get_device_capability())
        gpu.check_eight_bit(grouped=run.spec.eight_bit_experts)
    groups.model.grow(len(run.tokenizer))
    check_length(groups.model.hf_config().to_dict(), run.settings.seq_length)
    bridge = groups.model.bridge()
    provider = bridge.to_megatron_provider(load_weights=False)
    set_layers(run, bridge, provider)
    divide_model(run, provider)
    set_numbers(run, provider)
    set_recomputation(run, provider)
    if run.spec.cuda_graph:
        provider.cuda_graph_impl = "full_iteration"
        provider.use_te_rng_tracker = True
    vocab_size = provider.vocab_size
    provider.vocab_size = padded_rows(vocab_size, provider.tensor_model_parallel_size)
    if provider.vocab_size > vocab_size and not groups.model.random_init:
        fill_up_as_read(bridge, provider.vocab_size)
    register_hooks(run, bridge, provider, vocab_size)
    return MegatronModel(bridge, provider, vocab_size, build_adapter(run, bridge))


def set_layers(run: RunContext, bridge: "AutoBridge", provider: "GPTModelProvider") -> None:
    """Choose the implementation of the model's layers."""
    if run.platform.transformer_engine:
        provider.gradient_accumulation_fusion = False  # requires Apex; without it: sum_gradients_in_products
        provider.apply_rope_fusion = provider.position_embedding_type == "rope"
        provider.cross_entropy_loss_fusion = not run.settings.deterministic
        provider.cross_entropy_fusion_impl = "te"
        # Without dropout the fused function is one addition, and compiling it takes seconds.
        provider.bias_dropout_fusion = bool(provider.hidden_dropout)
        if run.spec.grouped_experts:
            eight_bit = bool(run.spec.eight_bit_base)
            provider.transformer_layer_spec = partial(grouped_layer_spec, eight_bit=eight_bit)
    else:
        use_local_layers(provider)
        check_expert_names(bridge, provider)
    if run.spec.eight_bit_base:
        provider.transformer_layer_spec = partial(
            eight_bit_layer_spec, provider.transformer_layer_spec, fully_sharded=run.spec.divided_before_read
        )


def divide_model(run: RunContext, provider: "GPTModelProvider") -> None:
    """Divide the model over processes.

    Raises:
        UserError: the platform can't do it, or the layers can't be divided so.
    """
    run.groups.parallelism.apply(provider, run.platform, run.spec.sequence_parallel)
    predictions = provider.mtp_num_layers
    check_stages(run.settings.megatron, provider.num_layers, run.spec.pipeline, run.spec.recompute_layers, predictions)
    run.spec.check_layers(provider.num_layers)
    stages = run.spec.stages_of(provider.num_layers)
    if stages is not None and len(set(stages)) > 1:
        provider.pipeline_model_parallel_layout = format_layout(stages)
    if run.spec.heads_exchanged:
        provider.cp_comm_type = "a2a"
    if run.spec.shapes_exchanged:
        provider.variable_seq_lengths = True
        provider.moe_token_dispatcher_type = "alltoall"  # Megatron refuses the other, of models without experts too


def set_numbers(run: RunContext, provider: "GPTModelProvider") -> None:
    """Set number formats, the length of sequences, and how losses are summed."""
    dtype = getattr(torch, run.groups.precision.dtype(run.platform.device))
    provider.params_dtype = dtype
    provider.autocast_dtype = dtype
    provider.pipeline_dtype = dtype
    provider.bf16 = dtype == torch.bfloat16
    provider.fp16 = False
    provider.seq_length = run.settings.seq_length
    provider.use_cpu_initialization = not run.on_gpu
    provider.calculate_per_token_loss = True  # the weighted sum of all losses, divided by the normaliser, once
    provider.deterministic_mode = run.settings.deterministic and run.on_gpu


def set_recomputation(run: RunContext, provider: "GPTModelProvider") -> None:
    """Have layers be computed again in the backward pass, as many as the run's specification says."""
    if run.spec.recompute != "none":
        provider.recompute_granularity = run.spec.recompute
    if run.spec.recompute == "full":
        provider.recompute_method = "uniform"
        provider.recompute_num_layers = 1
        if run.spec.recompute_layers is not None:
            provider.recompute_method = "block"  # of a stage's layers, the first ones
            provider.recompute_num_layers = run.spec.recompute_layers


def register_hooks(run: RunContext, bridge: "AutoBridge", provider: "GPTModelProvider", vocab_size: int) -> None:
    """Register what is done to the model as soon as it is built.

    Args:
        run, bridge, provider: of the model.
        vocab_size: rows of the vocabulary, without padding.
    """
    clock = run.clock
    transformer_engine = run.platform.transformer_engine
    offloaded = run.spec.offloaded_layers
    padded = provider.vocab_size > vocab_size

    def model_built(parts: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """A plain function: experts copy their configuration deeply, and a bound method with its object."""
        clock.mark("process groups, model")
        if padded:
            hide_padding(parts, vocab_size)
        if transformer_engine:
            choose_attention(parts)
        if offloaded:
            offload(parts, offloaded)
        return parts

    provider.register_pre_wrap_hook(model_built)
    if run.spec.divided_before_read:
        provider.register_post_wrap_hook(partial(fully_sharded.filled, base_loader(run, bridge)))


def build_adapter(run: RunContext, bridge: "AutoBridge") -> "PEFT | None":
    """Build Megatron-Bridge's adapter; one that the run starts from is loaded into it.

    Raises:
        UserError: this run has no adapter, or one of another kind or scale than it starts from.
    """
    adapter = run.groups.peft
    directory = run.groups.model.adapter
    if adapter is None:
        if directory:
            raise UserError(f"model.path={directory}: is an adapter; choose peft=lora, or merge it first")
        return None
    peft = adapter.build()
    peft.seed = run.config.seed
    peft.overlap = bool(run.spec.overlapped_exchanges)
    # A layer that is run again in the backward pass can't share tensors of the pass before it.
    peft.gather_at_once = run.spec.recompute != "full"
    if directory:
        adapter_checks.check(read_adapter(directory), adapter, directory)
        peft.start = lambda parts: load_adapter.load(bridge, parts, directory)
    return peft


def build_container(
    run: RunContext, model: MegatronModel, batches: RunBatches, before_save: Callable[[], None]
) -> ConfigContainer:
    """Build the configuration; `before_save` brings the run's progress up to date.

    Raises:
        UserError: `trainer.megatron` names what Megatron-Bridge doesn't have.
    """
    settings = run.settings
    groups = run.groups
    optimizer = groups.optimizer
    optimizer.use_distributed_optimizer = run.spec.divides_state
    mixed = mixed_precision(run)
    if run.spec.bf16_state:
        from posttrain.train import bf16_adam  # imports Transformer Engine, which a CPU hasn't

        assert mixed is not None
        bf16_adam.use(optimizer, mixed)
    if mixed is None:
        optimizer.params_dtype = model.provider.params_dtype
    container = ConfigContainer(
        model=model.provider,
        train=TrainingConfig(
            train_iters=run.steps,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=run.spec.micro_batch,
            exit_signal_handler=False,  # until there is something to save: callbacks.py
            manual_gc=True,  # the collector runs between steps on all ranks at once, not inside one of them
            manual_gc_interval=100,
        ),
        validation=ValidationConfig(
            eval_interval=None,  # validation is called by our callback, which also does it before training
            eval_iters=run.validation_steps,
            eval_global_batch_size=run.validation_batch_size,
            eval_micro_batch_size=run.spec.micro_batch,
        ),
        optimizer=optimizer,
        scheduler=schedule(run),
        ddp=data_parallel(run),
        dist=process_groups(run),
        dataset=RowsProvider.from_run(run, batches),
        logger=LoggerConfig(log_interval=1, skip_train_metrics_log=True, tensorboard_dir=None),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size),
        checkpoint=RunCheckpointConfig.from_group(
            groups.checkpoint,
            run.run_dir / "checkpoints",
            base_directory(run),
            resume.find(run.config, run.run_dir),
            saved_run(run, model, before_save),
        ),
        rng=RNGConfig(seed=run.config.seed, te_rng_tracker=bool(run.spec.cuda_graph)),
        rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=False),
        mixed_precision=mixed,
        peft=model.peft,
    )
    if groups.peft is not None and groups.peft.lora_plus_ratio is not None:
        container.optimizer_config_override_provider = LoRAPlus(groups.peft.lora_plus_ratio)
    apply_overrides(settings.megatron, container)
    return container


def mixed_precision(run: RunContext) -> "MixedPrecisionConfig | None":
    """The number formats of the group `precision`; None for fp32."""
    if run.spec.precision == "fp32":
        return None
    # Where the products in 8 bits are those of ops/fp8_linear.py, everything around them is bf16.
    if run.spec.precision == "fp8" and not run.spec.eight_bit_base:
        return get_mixed_precision_config("bf16_with_fp8_current_scaling_mixed")
    return get_mixed_precision_config("bf16_mixed")


def data_parallel(run: RunContext) -> DistributedDataParallelConfig:
    """How data-parallel processes share gradients: summed, normalised by tokens elsewhere."""
    parallelism = run.groups.parallelism
    divided = run.spec.divides_state
    overlap = parallelism.overlap and run.on_gpu and divided and run.spec.world > 1
    # Looking into each bucket waits for the device; the gradient's norm tells as much (train/nonfinite.py).
    looked_at = run.spec.cuda_graph or run.groups.optimizer.clip_grad or run.settings.on_nonfinite != "stop"
    return DistributedDataParallelConfig(
        use_distributed_optimizer=divided,
        overlap_grad_reduce=overlap,
        # Not where a layer may read its adapter's weights without the adapter's forward pass, which waits for them.
        overlap_param_gather=overlap and not run.groups.peft,
        average_in_collective=False,
        check_for_nan_in_grad=not looked_at,
        use_megatron_fsdp=parallelism.fsdp,
        data_parallel_sharding_strategy="optim_grads_params" if parallelism.fsdp else "no_shard",
        megatron_fsdp_main_grads_dtype=torch.float32,  # as the other layouts sum them
    )


def process_groups(run: RunContext) -> DistributedInitConfig:
    """How processes find and wait for each other."""
    parallelism = run.groups.parallelism
    return DistributedInitConfig(
        distributed_backend="nccl" if run.on_gpu else "gloo",
        use_gloo_process_groups=not run.on_gpu or run.spec.divides_state,
        use_megatron_fsdp=parallelism.fsdp,
        distributed_timeout_minutes=max(MIN_TIMEOUT_MINUTES, math.ceil(run.config.launch.timeout_s / 60)),
    )


def schedule(run: RunContext) -> "SchedulerConfig":
    """Return the group `scheduler` with what follows from the run; see posttrain.spec.schedule."""
    optimizer = run.groups.optimizer
    scheduler = run.groups.scheduler
    rates = run.schedule
    scheduler.lr_warmup_init = rates.first
    if scheduler.lr_warmup_fraction and rates.horizon != run.steps:
        scheduler.lr_warmup_fraction = rates.warmup / rates.horizon  # Megatron-Bridge's is a share of the horizon
    scheduler.lr_decay_iters = rates.horizon
    if rates.final:
        scheduler.lr_wsd_decay_iters = rates.final
    scheduler.start_weight_decay = optimizer.weight_decay
    scheduler.end_weight_decay = optimizer.weight_decay
    # Steps may be added to a run: its schedule is the new configuration's, from the step that it has reached.
    scheduler.override_opt_param_scheduler = True
    return scheduler


def saved_run(run: RunContext, model: MegatronModel, before_save: Callable[[], None]) -> SavedRun:
    """What the checkpoint manager needs of the run."""
    groups = run.groups
    load_base = partial(fully_sharded.fill, base_loader(run, model.bridge))
    if run.spec.divided_before_read:
        load_base = partial(fully_sharded.fill, leave_empty)
    return SavedRun(
        config=run.config,
        steps=run.steps,
        rows=len(run.splits.train),
        digests=rundir.object_if_any(run.run_dir, inputs.FILE),
        total_limit=groups.checkpoint.save_total_limit,
        keep_best=run.keeps_best,
        progress=run.progress,
        heartbeat=run.heartbeat,
        format="fsdp_dtensor" if run.spec.fsdp else "torch_dist",
        load_base=load_base,
        inputs=partial(fingerprints.inputs_of, run.splits, groups.model, groups.peft is not None),
        before_save=before_save,
        saved=lambda step, path: run.screen.print(f"step {step}: saved in {shown(str(path))}"),
    )


def base_loader(run: RunContext, bridge: "AutoBridge") -> fully_sharded.Fill:
    """What fills a model's chunks with the weights before training: of its files, or random ones."""
    if run.groups.model.random_init:
        return partial(draw_model, seed=run.config.seed)
    load: fully_sharded.Fill = bridge.load_hf_weights
    return load


def leave_empty(parts: list[torch.nn.Module]) -> None:
    """Fill nothing where Megatron-Bridge fills the base, before the adapters: the model is divided first."""


def base_directory(run: RunContext) -> Path:
    """The Hugging Face directory of the weights before training."""
    model = run.groups.model
    if not model.random_init:
        return model.directory
    directory = run.run_dir / "base"
    if run.is_first or not directory.exists():
        write_random_base(directory, model.hf_config())
    return directory


def write_random_base(directory: Path, hf_config: "PretrainedConfig") -> None:
    """Write a Hugging Face directory without a tensor: Megatron-Bridge requires one even where nothing is loaded."""
    directory.mkdir(parents=True, exist_ok=True)
    hf_config.save_pretrained(directory)
    save_file({}, directory / "model.safetensors")


def apply_overrides(sections: dict[str, Any], container: ConfigContainer) -> None:
    """Set `trainer.megatron.SECTION.KEY` on Megatron-Bridge's configuration.

    Raises:
        UserError: no such section or key.
    """
    for section, values in sections.items():
        target = getattr(container, section, None)
        if target is None or not isinstance(values, dict):
            raise UserError(f"trainer.megatron.{section}: Megatron-Bridge's configuration has no such section")
        for key, value in values.items():
            if not hasattr(target, key):
                raise UserError(f"trainer.megatron.{section}.{key}: unknown key{did_you_mean(key, vars(target))}")
            setattr(target, key, value)
