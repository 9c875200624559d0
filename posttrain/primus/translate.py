"""Translate a Primus configuration to this project's keys."""

import re
from dataclasses import dataclass, field
from typing import Any

from posttrain.config.composition import CONF_DIR
from posttrain.errors import UserError
from posttrain.primus.read import Primus
from posttrain.recipes.resolve import option_of
from posttrain.recipes.translate import DECIDED, SCHEDULERS, null_instead_of_zero

# Primus's key -> ours. Where two are listed, the first that the file has.
KEYS = {
    "train_iters": "trainer.max_steps",
    "global_batch_size": "trainer.global_batch_size",
    "micro_batch_size": "trainer.micro_batch_size",
    "seq_length": "trainer.seq_length",
    "log_interval": "trainer.log_interval",
    "eval_interval": "trainer.validation_interval",
    "eval_iters": "trainer.validation_batches",
    "seed": "seed",
    "finetune_lr": "optimizer.lr",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "adam_eps": "optimizer.adam_eps",
    "sgd_momentum": "optimizer.sgd_momentum",
    "clip_grad": "optimizer.clip_grad",
    "lr_decay_iters": "scheduler.lr_decay_iters",
    "tensor_model_parallel_size": "parallelism.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallelism.pipeline_model_parallel_size",
    "context_parallel_size": "parallelism.context_parallel_size",
    "expert_model_parallel_size": "parallelism.expert_model_parallel_size",
    "peft_dim": "peft.rank",
    "lora_rank": "peft.rank",
    "peft_alpha": "peft.alpha",
    "lora_alpha": "peft.alpha",
    "peft_dropout": "peft.dropout",
    "lora_dropout": "peft.dropout",
    "lora_target_modules": "peft.target_modules",
    "save_interval": "checkpoint.save_interval",
    "async_save": "checkpoint.async_save",
    "packed_sequence": "data.packing",
    "convert_to_hf": "trainer.export",
    "wandb_exp_name": "run.name",
}
PASSED = re.compile(
    r"moe_(?!\w*fus|router_force)\w+|expert_tensor_parallel_size"
    r"|virtual_pipeline_model_parallel_size|num_layers_in_\w+"
    r"|account_for_\w+|recompute_modules|cp_comm_type"
)
HUB_DATA = {  # data sets of Primus's examples -> format
    "alpaca": "alpaca",
    "alpaca-cleaned": "alpaca",
    "databricks-dolly-15k": "dolly",
    "oasst1": "oasst",
}
FORMATS = {"openai": "messages", "chatml": "messages", "jsonl": "prompt_completion"}
TEMPLATES = {"qwen": "chatml", "chatml": "chatml"}
SECRET = re.compile(r"(?i)token$|secret|password|api_key")  # values that no message repeats
# Settings that hold here anyway.
SETTLED = {
    "exit_on_missing_checkpoint",
    "file_sink_level",
    "finetune",
    "flavor",
    "log_throughput",
    "recipe",
    "save_lora_only",
    "sink_level",
    "stage",
    "stderr_sink_level",
    "task",
    "trainable",
    "use_checkpoint_args",
}


@dataclass
class Translation:
    """A run in this project's keys.

    Attributes:
        choices: group -> file, or list of files.
        values: key path -> value.
        run_dir: where the file puts checkpoints.
        left_out: what has no counterpart, and why.
    """

    choices: dict[str, str | list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    run_dir: str | None = None
    left_out: list[str] = field(default_factory=list)


class Reader:
    """The settings of a file, and which of them have been read."""

    def __init__(self, primus: Primus) -> None:
        self.primus = primus
        self.read = set(SETTLED)

    def get(self, *keys: str) -> Any:
        """Return the first of `keys` that is set; all of them then count as read."""
        self.read.update(keys)
        for key in keys:
            if self.primus.settings.get(key) is not None:
                return self.primus.settings[key]
        return None

    def explain(self, key: str, reason: str) -> str:
        """A line about a setting that is not taken over."""
        value = "..." if SECRET.search(key) else self.primus.settings[key]
        return f"{self.primus.where.get(key, key)}={value}: {reason}"


def translate_primus(primus: Primus, model_chosen: bool = False) -> Translation:
    """Translate a file.

    Args:
        primus: the file's settings.
        model_chosen: whether the command line chooses the model, so that the file need not.

    Raises:
        UserError: the file does not name its model in a form that can be used here, or a value is
            not supported.
    """
    done = Translation()
    reader = Reader(primus)
    _translate_peft(reader, done)
    for key, path in KEYS.items():
        value = reader.get(key)
        if path in done.values or key not in primus.settings:
            continue
        if value is not None or path.startswith("scheduler"):
            done.values[path] = null_instead_of_zero(path, value)
    if done.choices["peft"] == "none":
        for path in list(done.values):
            if path.startswith("peft."):
                del done.values[path]
    _translate_model(reader, done, model_chosen)
    _translate_data(reader, done)
    _translate_template(reader, done)
    _translate_training(reader, done)
    _translate_recompute(reader, done)
    _translate_precision(reader, done)
    _translate_files(reader, done)
    _translate_trackers(reader, done)
    _translate_rest(reader, done)
    return done


def _translate_peft(reader: Reader, done: Translation) -> None:
    kind = reader.get("peft")
    use_lora = reader.get("use_lora")
    if kind is None and use_lora is None:  # Primus's models for LoRA have it in their name
        settings = reader.primus.settings
        in_name = "lora" in (reader.primus.preset or "").lower()
        use_lora = in_name or "lora_rank" in settings or "peft_dim" in settings
    if kind is None:
        kind = "lora" if use_lora else "none"
    kind = str(kind).lower()
    if kind not in ("none", "lora", "dora"):
        raise UserError(f"{reader.primus.path}: peft={kind}: `peft=` here is lora, dora or none")
    done.choices["peft"] = kind


def _translate_model(reader: Reader, done: Translation, model_chosen: bool) -> None:
    """The model's Hugging Face name: from the file, or from the name of its preset."""
    hub = reader.get("hf_model_name_or_path", "hf_path", "hf_model_path")
    reader.read.add("convert_from_hf")
    for key in ("load", "pretrained_checkpoint"):
        if reader.get(key) is not None:
            reason = "a Megatron checkpoint; a run here starts from a Hugging Face model, see docs/primus.md"
            done.left_out.append(reader.explain(key, reason))
    if model_chosen:
        return
    preset = reader.primus.preset
    option = option_of(hub) if hub else option_of_preset(preset)
    if option is not None:
        done.choices["model"] = option
    elif hub is not None:
        done.choices["model"] = "hf"
        done.values["model.path"] = str(hub)
    else:
        unknown = f" (`{preset}` is not in conf/model)" if preset else ""
        raise UserError(
            f"{reader.primus.path}: does not name a Hugging Face model{unknown}; "
            "add model=NAME or model=hf model.path=DIR to the command"
        )


def option_of_preset(preset: str | None) -> str | None:
    """Return the file of conf/model for a preset of Primus: llama3.1_8B, llama31_8b_lora, ..."""
    name = re.sub(r"_(lora|sft|mxfp4|fp8|bf16)\b.*", "", (preset or "").lower()).replace(".", "")
    return name if name and _is_option("model", name) else None


def _is_option(group: str, name: str) -> bool:
    """Whether conf/ has that file."""
    return bool(re.fullmatch(r"[\w-]+", name)) and (CONF_DIR / group / f"{name}.yaml").is_file()


def _translate_data(reader: Reader, done: Translation) -> None:
    """The file or hub data set, its format and its split."""
    path = reader.get("train_data_path", "data_path", "data_paths")
    dataset = reader.get("dataset") or {}
    if not isinstance(dataset, dict):
        path = path or dataset
        dataset = {}
    hub_name = reader.get("dataset_name")
    if hub_name is not None:
        dataset = {**dataset, "dataset_name": hub_name}
    given_format = str(reader.get("dataset_format") or "").lower()
    data_format = FORMATS.get(given_format, given_format)
    name = dataset.get("dataset_name") or dataset.get("path_or_dataset")
    if name:
        path = name if str(name).startswith((".", "/", "~")) else f"hf://{name}"
        if not data_format:
            data_format = HUB_DATA.get(str(name).rpartition("/")[2].lower(), "")
    if reader.get("mock_data", "mock"):
        done.left_out.append("mock data: not supported; `data=demo` is small and real")
    elif path is None:
        done.left_out.append("no data are set; choose data= and data.path=")
    elif data_format and _is_option("data", data_format):
        done.choices["data"] = data_format
        done.values["data.path"] = path
    else:
        problem = f"dataset_format={given_format}" if given_format else "no known format"
        packing = "" if done.values.get("data.packing", True) else " data.packing=false"
        done.left_out.append(f"data {path}: {problem}; choose data=FORMAT data.path={path}{packing}")
    if "data" not in done.choices:
        done.values.pop("data.packing", None)
        return
    fraction = dataset.get("val_proportion") if dataset.get("do_validation", True) else None
    _translate_validation(reader, done, fraction)
    if "data.packing" not in done.values:
        done.left_out.append(
            "packed_sequence is not set: the default here packs several conversations into a "
            "sequence; for one each, add data.packing=false"
        )


def _translate_validation(reader: Reader, done: Translation, fraction: float | None) -> None:
    """Validation data: a file of their own, else a fraction of the training data.

    Args:
        fraction: as the file's `dataset` sets it; None: it doesn't.
    """
    valid_path = reader.get("valid_data_path")
    if valid_path:
        done.values["data.validation_path"] = valid_path
        return
    split = reader.get("split")
    if split and fraction is None:
        try:
            parts = [float(part) for part in str(split).split(",")]
        except ValueError:
            raise UserError(f"{reader.primus.path}: split={split}: expected numbers such as 95,5,0") from None
        if len(parts) > 1 and parts[1]:
            fraction = round(parts[1] / sum(parts), 6)
        if len(parts) > 2 and parts[2]:
            reason = "its third part, for tests, is trained on; keep it in a separate file"
            done.left_out.append(reader.explain("split", reason))
    if fraction:
        done.values["data.validation_fraction"] = fraction


def _translate_template(reader: Reader, done: Translation) -> None:
    for key in ("prompt_template", "chat_format"):
        name = str(reader.get(key) or "").lower()
        name = TEMPLATES.get(name, name)
        if not name:
            continue
        if not _is_option("template", name):
            done.left_out.append(reader.explain(key, "no such template; choose template="))
        elif done.choices.setdefault("template", name) != name:
            chosen = done.choices["template"]
            done.left_out.append(reader.explain(key, f"the template is {chosen}"))


def _translate_training(reader: Reader, done: Translation) -> None:
    """Optimizer, schedule and parallelism."""
    values = done.values
    path = reader.primus.path
    optimizer = str(reader.get("optimizer") or "adam")
    if optimizer not in ("adam", "sgd"):
        raise UserError(f"{path}: optimizer={optimizer}: `optimizer=` here is adam or sgd")
    done.choices["optimizer"] = optimizer
    style = str(reader.get("lr_decay_style") or "cosine")
    if style not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise UserError(f"{path}: lr_decay_style={style}: `scheduler=` here is {known}")
    done.choices["scheduler"] = SCHEDULERS[style]
    fraction = reader.get("lr_warmup_fraction")
    warmup = reader.get("lr_warmup_iters")
    if fraction is not None:
        values["scheduler.lr_warmup_fraction"] = fraction
        values["scheduler.lr_warmup_iters"] = 0
    elif warmup is not None:
        values["scheduler.lr_warmup_fraction"] = None
        values["scheduler.lr_warmup_iters"] = warmup

    done.choices["parallelism"] = "ddp"
    sequence_parallel = reader.get("sequence_parallel")
    tensor_size = values.get("parallelism.tensor_model_parallel_size", 1)
    if sequence_parallel is not None and tensor_size != 1:
        values["parallelism.sequence_parallel"] = sequence_parallel
    if reader.get("use_megatron_fsdp", "use_custom_fsdp"):
        values["parallelism.fsdp"] = True
        values["parallelism.distributed_optimizer"] = True
    distributed = reader.get("use_distributed_optimizer")
    if distributed is not None:
        values.setdefault("parallelism.distributed_optimizer", distributed)


def _translate_recompute(reader: Reader, done: Translation) -> None:
    granularity = reader.get("recompute_granularity")
    if reader.get("recompute_activations"):
        granularity = granularity or "selective"
    method = reader.get("recompute_method")
    layers = reader.get("recompute_num_layers")
    if not granularity:
        return
    done.values["trainer.recompute"] = granularity
    if granularity == "full" and (method, layers) not in ((None, None), ("uniform", 1)):
        done.values["trainer.megatron.model.recompute_method"] = method or "uniform"
        done.values["trainer.megatron.model.recompute_num_layers"] = layers or 1


def _translate_precision(reader: Reader, done: Translation) -> None:
    precision = str(reader.get("precision_config") or "").replace("-", "_")
    fp8 = reader.get("fp8")
    fp16 = reader.get("fp16")
    bf16 = reader.get("bf16")
    if precision.startswith("fp16") or fp16:
        done.choices["precision"] = "bf16"
        done.left_out.append("fp16: not supported; precision=bf16 has the range that fp16 requires loss scaling for")
    elif "fp8" in precision or "fp4" in precision or fp8:
        done.choices["precision"] = "fp8"
        if "current" not in precision:
            done.left_out.append(f"{precision or fp8}: fp8 is scaled per tensor by its current values here")
    elif precision.startswith("bf16") or bf16:
        done.choices["precision"] = "bf16"
    elif precision.startswith("fp32"):
        done.choices["precision"] = "fp32"


def _translate_files(reader: Reader, done: Translation) -> None:
    """Where results go."""
    save = reader.get("save")
    if save is not None:
        done.run_dir = str(save)
    if reader.get("skip_save"):
        done.values["checkpoint.save"] = False
    if reader.get("no_save_optim"):
        done.values["checkpoint.save_optimizer"] = False
    export = reader.get("hf_save_path")
    if export is not None:
        location = "RUN_DIR/hf"
        if done.choices["peft"] != "none":
            location = "RUN_DIR/adapter; docs/primus.md says how to merge it"
        done.left_out.append(f"hf_save_path={export}: the result is {location}")


def _translate_trackers(reader: Reader, done: Translation) -> None:
    trackers = []
    project = reader.get("wandb_project")
    entity = reader.get("wandb_entity")
    if project is not None:
        trackers.append("wandb")
        done.values["logger.wandb.project"] = project
        if entity is not None:
            reason = "to whom a run is sent is said on the command line: logger.wandb.entity=NAME, or by WANDB_ENTITY"
            done.left_out.append(reader.explain("wandb_entity", reason))
    if reader.get("tensorboard_dir") is not None:
        trackers.append("tensorboard")
        reason = "events are written to RUN_DIR/tensorboard"
        done.left_out.append(reader.explain("tensorboard_dir", reason))
    if trackers:
        done.choices["logger"] = trackers


def _translate_rest(reader: Reader, done: Translation) -> None:
    """Every other setting: passed through to Megatron-Bridge, decided here, or left out.

    Settings that are null or false change nothing and are not mentioned.
    """
    sections = ("model", "optimizer", "scheduler", "ddp", "train", "checkpoint")
    patterns = [DECIDED[section] for section in sections]
    decided = re.compile("|".join([*patterns, "no_save_rng", r"no_load_\w+"]))
    for key, value in reader.primus.settings.items():
        if key in reader.read or value is None or value is False:
            continue
        if PASSED.fullmatch(key):
            done.values[f"trainer.megatron.model.{key}"] = value
        elif decided.fullmatch(key):
            done.left_out.append(reader.explain(key, "decided by posttrain for the machine"))
        elif key == "moe_router_force_load_balancing":
            reason = "sends tokens to experts at random, for measurements only"
            done.left_out.append(reader.explain(key, reason))
        elif "turbo" in key:
            done.left_out.append(reader.explain(key, "kernels for AMD GPUs"))
        else:
            done.left_out.append(reader.explain(key, "no counterpart"))
