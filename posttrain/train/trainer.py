"""One run, from top to bottom: data, Megatron's configuration, `megatron.bridge.training.finetune`, what is left.

There is no training loop here: Megatron-Bridge's own runs, on a CPU as on a cluster; what this project adds comes in
through its callbacks.
"""

import logging
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.checkpoint import resume
from posttrain.checkpoint.progress import Progress
from posttrain.errors import UserError
from posttrain.patches import Platform
from posttrain.spec.run_spec import RunSpec, resolve_spec
from posttrain.train.startup_clock import Startup
from posttrain.utils.heartbeat import Heartbeat

log = logging.getLogger(__name__)


class Trainer:
    """The config group `trainer`, holding the instantiated other groups.

    Args:
        model, peft, data, template, parallelism, optimizer, scheduler, precision, checkpoint: the groups' objects; peft
            None: full fine-tuning; optimizer and scheduler are Megatron-Bridge's own configurations.
        trackers: where metrics go besides metrics.jsonl.
        platform: device and whether Transformer Engine is there.
        run_dir: where everything is written.
        frozen: the frozen configuration.
        startup: the clock of the run's start.
        settings: the keys of conf/trainer/default.yaml.
    """

    def __init__(
        self, *, model, peft, data, template, parallelism, optimizer, scheduler, precision, checkpoint,
        trackers: list, platform: Platform, run_dir: Path, frozen: DictConfig, startup: Startup, **settings: Any,
    ) -> None:  # fmt: skip
        self.model, self.data, self.template, self.parallelism = model, data, template, parallelism
        self.optimizer, self.scheduler, self.precision, self.checkpoint = optimizer, scheduler, precision, checkpoint
        self.trackers, self.platform, self.run_dir, self.config = trackers, platform, run_dir, frozen
        self.startup = startup
        self.settings = OmegaConf.create(settings)
        self.adapter = peft
        self.peft = peft.build() if peft else None
        if self.peft is not None:
            self.peft.seed = frozen.seed
        self.progress, self.heartbeat = Progress(), Heartbeat()
        self.live: tuple[list[Any], Any] = ([], None)  # the model's chunks and the optimizer, once training begins
        self.base_check: dict[str, Any] | None = None  # what posttrain.convert.export.check_base found
        self.skipped: list[str] = []  # damaged checkpoints that were passed over
        if model.adapter:
            self.start_from(model.adapter)
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def fit(self) -> None:
        """Validate, train, validate, save, export."""
        import torch
        from megatron.bridge.training.finetune import finetune

        from posttrain.data.sealed import Used
        from posttrain.train.callbacks import RunCallback
        from posttrain.train.forward_step import forward_step

        self.tokenizer = self.model.load_tokenizer()
        self.cached = Used(verify=os.environ.get("LOCAL_RANK", "0") == "0")  # ends before the first step, see callbacks
        self.splits = self.data.build(
            tokenizer=self.tokenizer, template=self.template, seq_length=self.settings.seq_length,
            seed=self.config.seed, cache_dir=self.cache_dir(),
            length_multiple=self.spec.conversation_multiple,
            used=self.cached,
        )  # fmt: skip
        self.tokenizer.chat_template = self.template.source(self.tokenizer)  # exported with the model
        if not len(self.splits.train):
            raise UserError("data: no conversation is left to train on; see the counts in the log, or use preview")
        self.startup.mark("data")
        try:
            finetune(self.container(), forward_step, callbacks=[RunCallback(self)])
        except torch.OutOfMemoryError as error:
            from posttrain.train import out_of_memory

            raise UserError(out_of_memory.of_trainer(self, error)) from error

    def start_from(self, directory: Path) -> None:
        """Continue from a PEFT adapter.

        Raises:
            UserError: this run has no adapter, or one of another kind or scale.
        """
        from posttrain.models.hf_adapter import read_adapter
        from posttrain.peft import adapter_checks as settings
        from posttrain.peft import load_adapter

        if self.peft is None:
            raise UserError(f"model.path={directory}: is an adapter; choose peft=lora, or merge it first")
        settings.check(read_adapter(directory), self.adapter, directory)
        self.peft.start = lambda parts: load_adapter.load(self.bridge, parts, directory)

    def cache_dir(self) -> Path:
        """Where rendered data is kept between runs."""
        from posttrain.utils.cache import cache_root

        return Path(self.config.cache_dir) if self.config.cache_dir else cache_root()

    @cached_property
    def spec(self) -> RunSpec:
        """Every decision that follows from the configuration and the machine."""
        found = resolve_spec(
            self.config, self.world, self.platform.transformer_engine, self.platform.device, self.shape
        )
        found.check()
        return found

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.spec.steps(len(self.splits.train))

    @property
    def validation_batch_size(self) -> int:
        """Packed sequences of a validation batch."""
        return self.spec.validation_batch(len(self.splits.validation or ()))

    @property
    def validation_steps(self) -> int:
        """Global batches of one validation."""
        return self.spec.validation_steps(len(self.splits.validation or ()))

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The model's config.json fields."""
        return self.model.hf_config().to_dict()

    def container(self) -> Any:
        """Return Megatron-Bridge's whole configuration for this run."""
        from megatron.bridge.training.config import (
            ConfigContainer,
            LoggerConfig,
            RerunStateMachineConfig,
            RNGConfig,
            TokenizerConfig,
            TrainingConfig,
            ValidationConfig,
        )

        from posttrain.train.dataset_provider import RowsProvider

        provider = self.provider()
        s = self.settings
        self.optimizer.use_distributed_optimizer = self.parallelism.distributed_optimizer
        mixed = self.precision.build(self.platform.device, bool(self.spec.eight_bit_base))
        if mixed is None:
            self.optimizer.params_dtype = provider.params_dtype
        # Megatron's warm-up starts at 0, a step that changes nothing; start at its first fraction instead.
        warmup = self.scheduler.lr_warmup_iters or int((self.scheduler.lr_warmup_fraction or 0) * self.steps)
        self.scheduler.lr_warmup_init = self.optimizer.lr / (warmup + 1)
        self.scheduler.start_weight_decay = self.scheduler.end_weight_decay = self.optimizer.weight_decay
        # Steps may be added to a run: its schedule is the new configuration's, from the step that it has reached.
        self.scheduler.override_opt_param_scheduler = True
        resume_from = resume.find(self.config, self.run_dir)
        ddp = self.parallelism.ddp(self.platform)
        # Looking into each bucket waits for the device; the gradient's norm tells as much (train/nonfinite.py).
        ddp.check_for_nan_in_grad = not (self.spec.cuda_graph or self.optimizer.clip_grad or s.on_nonfinite != "stop")
        dist = self.parallelism.dist(self.platform)
        dist.distributed_timeout_minutes = max(10, math.ceil(self.config.launch.timeout_s / 60))
        if self.spec.cuda_graph:
            provider.cuda_graph_impl = "full_iteration"
            provider.use_te_rng_tracker = True
        container = ConfigContainer(
            model=provider,
            train=TrainingConfig(
                train_iters=self.steps,
                global_batch_size=s.global_batch_size,
                micro_batch_size=s.micro_batch_size,
                exit_signal_handler=False,  # until there is something to save: callbacks.py
                manual_gc=True,  # the collector runs between steps on all ranks at once, not inside one of them
                manual_gc_interval=100,
            ),
            validation=ValidationConfig(
                eval_interval=None,  # validation is called by our callback, which also does it before training
                eval_iters=self.validation_steps,
                eval_global_batch_size=self.validation_batch_size,
                eval_micro_batch_size=s.micro_batch_size,
            ),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ddp=ddp,
            dist=dist,
            dataset=RowsProvider.of(self),
            logger=LoggerConfig(log_interval=1, skip_train_metrics_log=True, tensorboard_dir=None),
            tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=self.vocab_size),
            checkpoint=self.checkpoint.build(
                self.run_dir / "checkpoints", str(self.base_directory()), resume_from, self
            ),
            rng=RNGConfig(seed=self.config.seed, te_rng_tracker=bool(self.spec.cuda_graph)),
            rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=False),
            mixed_precision=mixed,
            peft=self.peft,
        )
        if self.adapter and self.adapter.lora_plus_ratio is not None:
            from posttrain.peft.lora_plus import LoRAPlus

            container.optimizer_config_override_provider = LoRAPlus(self.adapter.lora_plus_ratio)
        self.apply_overrides(container)
        return container

    def provider(self) -> Any:
        """Return the Megatron model provider: the model's shape with this run's sizes, precision and layers."""
        from posttrain.models.local_spec import use_local_layers

        self.model.grow(len(self.tokenizer))
        self.bridge = self.model.bridge()
        provider = self.bridge.to_megatron_provider(load_weights=False)
        if not self.platform.transformer_engine:
            use_local_layers(provider)
        else:
            provider.gradient_accumulation_fusion = False  # wants Apex
            provider.apply_rope_fusion = provider.position_embedding_type == "rope"
            provider.cross_entropy_loss_fusion = not self.settings.deterministic
            provider.cross_entropy_fusion_impl = "te"
            # Without dropout the fused function is one addition, and compiling it takes seconds.
            provider.bias_dropout_fusion = bool(provider.hidden_dropout)
        self.parallelism.apply(provider, self.platform, self.spec.sequence_parallel)
        dtype = self.precision.dtype(self.platform.device)
        provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = dtype
        provider.bf16 = str(dtype) == "torch.bfloat16"
        provider.fp16 = False
        provider.seq_length = self.settings.seq_length
        provider.use_cpu_initialization = self.platform.device == "cpu"
        provider.calculate_per_token_loss = True  # the sum over all supervised tokens, divided by their number, once
        provider.variable_seq_lengths = not self.data.packing and provider.pipeline_model_parallel_size > 1
        provider.deterministic_mode = self.settings.deterministic and self.platform.device == "cuda"
        if self.settings.recompute != "none":
            provider.recompute_granularity = self.settings.recompute
            if self.settings.recompute == "full":
                provider.recompute_method, provider.recompute_num_layers = "uniform", 1
        # A plain function: experts copy their configuration deeply, and a bound method with its object.
        provider.register_pre_wrap_hook(lambda parts: self._model_built(parts))
        self.vocab_size = provider.vocab_size
        if self.vocab_size % provider.tensor_model_parallel_size:
            provider.vocab_size, provider.should_pad_vocab = None, True  # taken from the tokenizer and padded
            provider.make_vocab_size_divisible_by = 1
        return provider

    def _model_built(self, parts: list[Any]) -> list[Any]:
        self.startup.mark("process groups, model")
        if self.vocab_size % self.parallelism.tensor_model_parallel_size:
            from posttrain.models.padding import hide_padding

            hide_padding(parts, self.vocab_size)
        return parts

    def base_directory(self) -> Path:
        """The Hugging Face directory of the weights before training."""
        if not self.model.random_init:
            return self.model.directory
        from posttrain.patches.correctness.random_base_weights import write_random_base

        directory = self.run_dir / "base"
        if self.rank == 0 or not directory.exists():
            write_random_base(directory, self.model.hf_config())
        return directory

    def apply_overrides(self, container: Any) -> None:
        """Set `trainer.megatron.SECTION.KEY` on Megatron-Bridge's configuration.

        Raises:
            UserError: no such section or key.
        """
        import difflib

        for section, values in (OmegaConf.to_container(self.settings.megatron) or {}).items():
            target = getattr(container, section, None)
            if target is None or not isinstance(values, dict):
                raise UserError(f"trainer.megatron.{section}: Megatron-Bridge's configuration has no such section")
            for key, value in values.items():
                if not hasattr(target, key):
                    close = difflib.get_close_matches(key, vars(target), n=1)
                    meant = f"; did you mean {close[0]}?" if close else ""
                    raise UserError(f"trainer.megatron.{section}.{key}: unknown key{meant}")
                setattr(target, key, value)
