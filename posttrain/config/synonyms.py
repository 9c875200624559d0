"""Names that people bring from other frameworks, and what says the same here.

The names are those of Transformers, PEFT, TRL, axolotl, LLaMA-Factory and Lightning. An unknown key or choice is looked
up here before a mistyped one is suspected. `python -m posttrain.config.synonyms` prints the table of docs/names.md.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counterpart:
    """What corresponds to some names.

    Attributes:
        names: keys, in whatever group somebody puts them; or choices, as `group=choice`.
        overrides: that say the same, with example values. Empty: nothing corresponds.
        remark: what differs, or what to do instead.
    """

    names: tuple[str, ...]
    overrides: str = ""
    remark: str = ""

    @property
    def advice(self) -> str:
        """The end of an error message, from its semicolon on."""
        if not self.overrides:
            return f"; {self.remark}"
        remark = f" ({self.remark})" if self.remark else ""
        return f"; here it is `{self.overrides}`{remark}"


def _same(names: str, overrides: str, remark: str = "") -> Counterpart:
    return Counterpart(tuple(names.split()), overrides, remark)


def _instead(names: str, remark: str) -> Counterpart:
    return Counterpart(tuple(names.split()), remark=remark)


BATCH = "trainer.global_batch_size=32 trainer.micro_batch_size=1"
WARMUP_STEPS = "scheduler.lr_warmup_iters=100 scheduler.lr_warmup_fraction=null"
HELD_OUT = "a share of data.path; a file of its own: data.validation_path"
MODEL = "model=hf model.path=DIR_OR_HUB_ID"
DATA = "data=alpaca data.path=my.json"

TABLE = (
    # Optimizer and schedule.
    _same("learning_rate peak_lr base_lr", "optimizer.lr=2e-5"),
    _same("max_grad_norm gradient_clipping gradient_clip_val grad_clip", "optimizer.clip_grad=1.0"),
    _same("adam_epsilon", "optimizer.adam_eps=1e-8"),
    _same("optim optimizer_type", "optimizer=adam", "AdamW; or sgd"),
    _same("optimizer=adamw optimizer=adamw_torch optimizer=adamw_torch_fused", "optimizer=adam", "it is AdamW"),
    _instead(
        "optimizer=adamw_8bit optimizer=adamw_bnb_8bit optimizer=paged_adamw_8bit optimizer=paged_adamw_32bit",
        "there is no such optimizer; optimizer=adam_bf16 has half of adam's state, parallelism=zero1 divides it",
    ),
    _same("lr_scheduler_type lr_scheduler", "scheduler=cosine", "or linear, constant, wsd"),
    _same("scheduler=constant_with_warmup", "scheduler=constant"),
    _same("scheduler=warmup_stable_decay", "scheduler=wsd"),
    _same("warmup_ratio", "scheduler.lr_warmup_fraction=0.05"),
    _same("warmup_steps num_warmup_steps lr_warmup_steps", WARMUP_STEPS),
    _same(
        "min_lr_rate min_lr_ratio cosine_min_lr_ratio", "optimizer.min_lr=1e-6", "a rate, not a share of optimizer.lr"
    ),
    _same("loraplus_lr_ratio", "peft.lora_plus_ratio=16"),
    # Length of a run and batches.
    _same("num_train_epochs num_epochs n_epochs max_epochs", "trainer.epochs=3"),
    _same("max_train_steps num_train_steps train_iters trainer.steps num_steps", "trainer.max_steps=1000"),
    _same(
        "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu",
        "trainer.micro_batch_size=1",
        "packed sequences in one forward pass; a step has trainer.global_batch_size of them",
    ),
    _same(
        "gradient_accumulation_steps grad_accum_steps gradient_accumulation accumulate_grad_batches",
        "trainer.global_batch_size=32",
        "packed sequences of a step over all processes; accumulation follows from it and trainer.micro_batch_size",
    ),
    _same("gbs", "trainer.global_batch_size=32"),
    _same("mbs", "trainer.micro_batch_size=1"),
    _same("batch_size train_batch_size", BATCH, "packed sequences of a step over all processes, and of a forward pass"),
    _instead(
        "per_device_eval_batch_size eval_batch_size micro_batch_size_eval",
        "validation has the batches of training; trainer.validation_batches limits how many",
    ),
    _same(
        "max_seq_length max_seq_len seq_len max_length cutoff_len sequence_len model_max_length context_length "
        "block_size",
        "trainer.seq_length=4096",
        "tokens of a packed sequence; data.max_length limits one conversation",
    ),
    _same("sample_packing", "data.packing=true"),
    _instead(
        "pad_to_sequence_len pad_to_max_length group_by_length",
        "not needed: data.packing=true fills each sequence with several conversations",
    ),
    # Validation, samples, logs.
    _same("eval_steps val_check_interval eval_interval", "trainer.validation_interval=100", "steps"),
    _same(
        "eval_strategy evaluation_strategy do_eval evals_per_epoch",
        "trainer.validation_interval=100",
        "steps between validations; there is one before and one after training anyway",
    ),
    _same("val_split val_size val_set_size validation_split test_size", "data.validation_fraction=0.1", HELD_OUT),
    _same("validation_split_percentage", "data.validation_fraction=0.05", f"0.05 is 5 per cent; {HELD_OUT}"),
    _same("eval_dataset eval_file validation_file val_file test_datasets", "data.validation_path=validation.json"),
    _same("max_eval_samples", "data.max_validation_rows=100"),
    _same("eval_iters limit_val_batches", "trainer.validation_batches=10"),
    _same("logging_steps log_every_n_steps log_freq", "trainer.log_interval=10"),
    _same("report_to", "logger=wandb", "or csv, mlflow, tensorboard, trackio; several: logger=[wandb,csv]"),
    _same("use_wandb", "logger=wandb"),
    _same("tensorboard_dir use_tensorboard", "logger=tensorboard"),
    _same("wandb_project", "logger=wandb logger.wandb.project=my_project"),
    _same("wandb_entity", "logger=wandb logger.wandb.entity=my_team"),
    _same("wandb_group wandb_run_group run_group", "logger=wandb logger.wandb.group=my_group"),
    _same("mlflow_experiment mlflow_experiment_name", "logger=mlflow logger.mlflow.experiment=my_project"),
    _same("mlflow_tracking_uri", "logger=mlflow logger.mlflow.tracking_uri=URI"),
    _same("trackio_space_id", "logger=trackio logger.trackio.space_id=OWNER/NAME"),
    _same("wandb_tags", "logger=wandb logger.wandb.tags=[a,b]"),
    _same("wandb_mode", "logger=wandb logger.wandb.mode=offline"),
    _same(
        "run_name experiment_name exp_name wandb_exp_name wandb_name wandb_run_name logger.wandb.name "
        "logger.tensorboard.name",
        "run.name=my_run",
    ),
    # Where to, saves.
    _same("output_dir out_dir save_dir default_root_dir logging_dir", "hydra.run.dir=outputs/my_run"),
    _same("save_steps save_freq every_n_train_steps", "checkpoint.save_interval=500", "steps"),
    _same(
        "save_strategy saves_per_epoch",
        "checkpoint.save_interval=500",
        "steps between saves; checkpoint.save=false: none",
    ),
    _same("save_time_interval train_time_interval save_every_minutes", "checkpoint.save_interval_minutes=15"),
    _same("save_only_model", "checkpoint.save_optimizer=false"),
    _same(
        "load_best_model_at_end metric_for_best_model save_best",
        "trainer.export=best",
        "by the validation loss; checkpoint.keep_best=true: the best is kept, the last is exported",
    ),
    _same("early_stopping_patience early_stop_patience", "trainer.early_stopping.patience=3", "validations"),
    _same("early_stopping_threshold", "trainer.early_stopping.min_delta=0.01"),
    _same(
        "resume_from_checkpoint auto_resume_from_checkpoints",
        "run.resume=auto",
        "the default: the same command with the same hydra.run.dir resumes; or a run directory to start from",
    ),
    _instead(
        "overwrite_output_dir",
        "a run resumes in its directory; to begin again choose another hydra.run.dir, or remove it",
    ),
    _instead(
        "push_to_hub hub_model_id", "after the run: python -m posttrain.convert push checkpoint=RUN convert.repo=ID"
    ),
    # The model.
    _same(
        "model_name_or_path pretrained_model_name_or_path base_model model_id model_name model.name hf_model",
        MODEL,
        "or one of conf/model, e.g. model=llama3_8b",
    ),
    _same("tokenizer_name tokenizer_name_or_path tokenizer_path", "model.tokenizer=DIR_OR_HUB_ID"),
    _same(
        "bf16 mixed_precision torch_dtype dtype compute_dtype", "precision=bf16", "or fp32, fp8; auto is bf16 on a GPU"
    ),
    _instead(
        "fp16 float16 precision=fp16 precision=float16 precision=16 precision=16-mixed",
        "there is no fp16; take precision=bf16, on a CPU fp32",
    ),
    _same("precision=bfloat16 precision=bf16-mixed precision=bf16-true", "precision=bf16"),
    _same("precision=float32 precision=32 precision=32-true", "precision=fp32"),
    _instead(
        "attn_implementation flash_attn flash_attention use_flash_attention_2 xformers_attention",
        "nothing to set: attention is the fastest that the machine has; see python -m posttrain.doctor",
    ),
    _instead(
        "use_liger_kernel use_liger liger_kernel use_unsloth enable_liger_kernel",
        "nothing to set: losses and LoRA layers are fused by default",
    ),
    _instead(
        "torch_compile compile",
        "nothing to set: layers and losses are fused, and a step is a CUDA graph where it can be (trainer.cuda_graph)",
    ),
    _instead("model_type tokenizer_type", "not needed: the model's and the tokenizer's own files say it"),
    _instead("hf_token hub_token use_auth_token", "log in with `hf auth login`, or set HF_TOKEN in the environment"),
    # LoRA.
    _same("lora_r lora_rank r", "peft.rank=16"),
    _same("lora_alpha", "peft.alpha=32"),
    _same("lora_dropout", "peft.dropout=0.05"),
    _same("lora_target_modules lora_target", "peft.target_modules=[q_proj,v_proj]", "or all-linear, the default"),
    _same("lora_target_linear", "peft.target_modules=all-linear"),
    _same("use_rslora peft_use_rslora", "peft.rslora=true"),
    _same("use_dora peft_use_dora", "peft=dora"),
    _same("use_peft use_lora finetuning_type peft_type adapter", "peft=lora", "or dora; peft=none trains all weights"),
    _same("peft=full peft=freeze", "peft=none", "all weights"),
    _instead(
        "load_in_4bit load_in_8bit quantization_bit quantization peft=qlora",
        "there are no weights in 4 bits; precision=fp8 with peft=lora keeps frozen weights in 8 bits on a Hopper GPU",
    ),
    _same("adapter_name_or_path lora_model_dir", "model=hf model.path=ADAPTER_DIR", "continues from a PEFT adapter"),
    # Memory and processes.
    _same(
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing",
        "trainer.recompute=full",
        "or selective; none: not by parallelism=auto either",
    ),
    _same(
        "activation_offloading activation_offload enable_activation_offloading cpu_offloading_num_layers",
        "trainer.offload_layers=16",
        "of how many layers; parallelism=auto finds it",
    ),
    _same(
        "deepspeed deepspeed_config ds_config parallelism=deepspeed parallelism=zero2",
        "parallelism=zero1",
        "divides the optimizer's state; fsdp, tp2, pp2 and others divide the weights",
    ),
    _same(
        "fsdp fsdp_config parallelism=fsdp2 parallelism=zero3", "parallelism=fsdp", "Megatron's own, ZeRO stage 3; LoRA"
    ),
    _same("tensor_parallel_size tp_size tp", "parallelism.tensor_model_parallel_size=2", "or parallelism=tp2"),
    _same("pipeline_parallel_size pp_size pp", "parallelism.pipeline_model_parallel_size=2", "or parallelism=pp2"),
    _same("cp_size cp", "parallelism.context_parallel_size=2", "or parallelism=cp2"),
    _same("expert_parallel_size ep_size ep", "parallelism.expert_model_parallel_size=2", "or parallelism=ep2"),
    _same(
        "num_gpus n_gpus gpus devices num_processes nproc n_procs",
        "parallelism.nproc_per_node=8",
        "null: all that are visible; plan.gpus=8 plans for as many",
    ),
    _same("num_nodes num_machines", "launch.nnodes=2"),
    _same("dataloader_num_workers", "trainer.num_workers=2"),
    # Data.
    _same(
        "dataset_path dataset_name train_file data_path train_data data_files data.file data.files data.filename",
        DATA,
        "`data=` names the format; without it the columns do",
    ),
    _same("dataset datasets", DATA, "`data=` names the format; several files: data.sources"),
    _same("dataset_text_field", "objective=text data.format.column=text", "continued pre-training"),
    _same("chat_template", "template=chatml", "`template=model`, the default, is the tokenizer's own"),
    _same("max_samples max_train_samples", "data.max_train_rows=1000"),
    _same(
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss roles_to_train",
        "data.train_on=assistant",
        "the default; all: prompts too, last: the last answer",
    ),
    _same("mask_history", "data.train_on=last"),
    _same("data_seed", "data.seed=1234"),
    _instead("streaming", "not needed: files of any size are read in a stream, and what is rendered of them is cached"),
    _same("random_seed manual_seed", "seed=1234"),
    # Where a run is started.
    _same(
        "hydra/launcher=joblib",
        "hydra/launcher=local sweep.parallel=4",
        "the default: trials in processes of their own, sweep.parallel at once",
    ),
    _same("hydra/launcher=submitit_slurm hydra/launcher=submitit", "hydra/launcher=slurm", "docs/slurm.md"),
    _same("hydra/launcher=submitit_local hydra/launcher=ray hydra/launcher=basic", "hydra/launcher=local"),
)


def _by_name() -> dict[str, Counterpart]:
    entries = {}
    for counterpart in TABLE:
        for name in counterpart.names:
            entries[name] = counterpart
    return entries


COUNTERPARTS = _by_name()


def advice_on_key(key: str) -> str:
    """The end of an error message about an unknown key, empty where nothing is known of it.

    Args:
        key: of a path the longest end that is in the table counts: `args.logger.wandb.name` is not just any `name`.
    """
    end = key.lower()
    while end and end not in COUNTERPARTS:
        end = end.partition(".")[2]
    return COUNTERPARTS[end].advice if end else ""


def advice_on_choice(group: str, choice: str) -> str:
    """The end of an error message about an unknown choice of a group, empty where nothing is known of it."""
    counterpart = COUNTERPARTS.get(f"{group}={choice}".lower())
    return counterpart.advice if counterpart else ""


def table() -> str:
    """The table of docs/names.md, in Markdown."""
    lines = ["| there | here | |", "|---|---|---|"]
    for counterpart in TABLE:
        names = ", ".join(f"`{name}`" for name in counterpart.names)
        overrides = f"`{counterpart.overrides}`" if counterpart.overrides else ""
        lines.append(f"| {names} | {overrides} | {counterpart.remark} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
