"""Translate a Primus configuration to this project's keys."""

import re
from dataclasses import dataclass, field
from typing import Any

from posttrain.config.composition import CONF_DIR
from posttrain.errors import UserError
from posttrain.primus.read import Primus
from posttrain.recipes.resolve import option_of
from posttrain.recipes.translate import BF16_MOMENTS, DECIDED, MOMENTS, SCHEDULERS, is_bf16, null_instead_of_zero

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
# Settings that hold here anyway, with the value that does.
SETTLED = {
    "convert_from_hf": True,
    "exit_on_missing_checkpoint": True,
    "finetune": True,
    "log_throughput": True,
    "save_lora_only": True,
    "stage": "sft",
    "task": "posttrain",
    "trainable": True,
    "use_checkpoint_args": True,
}
OF_RECIPE = {"recipe", "flavor", "config"}  # names of files and functions whose values are not in this one


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
    """The settings of a file, and which of them have been read.

    Args:
        primus: the file's settings.
        left_out: takes a line for each setting that is set and not used.
    """

    def __init__(self, primus: Primus, left_out: list[str]) -> None:
        self.primus = primus
        self.left_out = left_out
        self.read: set[str] = set()
        for key, value in SETTLED.items():
            if primus.settings.get(key) == value:
                self.read.add(key)

    def get(self, *keys: str) -> Any:
        """Return the first of `keys` that is set; all of them then count as read, and the others lose against it."""
        self.read.update(keys)
        found = [key for key in keys if self.primus.settings.get(key) is not None]
        if not found:
            return None
        value = self.primus.settings[found[0]]
        for key in found[1:]:
            if self.primus.settings[key] != value:
                self.leave_out(key, f"{self.where(found[0])} is used")
        return value

    def where(self, key: str) -> str:
        """Where a setting stands in the file."""
        return self.primus.where.get(key, key)

    def leave_out(self, key: str, reason: str) -> None:
        """Say that a setting is not taken over; null and false say nothing."""
        value = self.primus.settings.get(key)
        if value is None or value is False:
            return
        self.left_out.append(f"{self.where(key)}={shown(key, value)}: {reason}")


def shown(key: str, value: object) -> object:
    """A setting's value as it may be printed."""
    return "..." if SECRET.search(key) else value


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
    reader = Reader(primus, done.left_out)
    for key, value, winner in primus.repeated:
        done.left_out.append(f"{key}={shown(key, value)}: {winner} is used")
    for key in primus.ignored:
        done.left_out.append(f"{key}: only modules.post_trainer is imported")
    _translate_peft(reader, done)
    _translate_keys(reader, done)
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


def _translate_keys(reader: Reader, done: Translation) -> None:
    """The settings that are a value here, each under its own key."""
    settings = reader.primus.settings
    spellings: dict[str, list[str]] = {}
    for key, path in KEYS.items():
        spellings.setdefault(path, []).append(key)
    for path, keys in spellings.items():
        value = reader.get(*keys)
        if path.startswith("peft.") and done.choices["peft"] == "none":
            for key in keys:
                reader.leave_out(key, "all weights are trained (peft: none)")
            continue
        null_means_never = path.startswith("scheduler") and any(key in settings for key in keys)
        if value is not None or null_means_never:
            done.values[path] = null_instead_of_zero(path, value)


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
    if use_lora is not None and bool(use_lora) != (kind != "none") and "use_lora" in reader.primus.settings:
        done.left_out.append(f"{reader.where('use_lora')}={use_lora}: {reader.where('peft')}={kind} is used")
    done.choices["peft"] = kind


def _translate_model(reader: Reader, done: Translation, model_chosen: bool) -> None:
    """The model's Hugging Face name: from the file, or from the name of its preset."""
    hub = reader.get("hf_model_name_or_path", "hf_path", "hf_model_path")
    for key in ("load", "pretrained_checkpoint"):
        reader.read.add(key)
        reader.leave_out(key, "a Megatron checkpoint; a run here starts from a Hugging Face model, see docs/primus.md")
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
    dataset = _dataset(reader, done)
    if "path" in dataset:
        path = path or dataset.pop("path")
    given_format = str(reader.get("dataset_format") or "").lower()
    data_format = FORMATS.get(given_format, given_format)
    name = dataset.pop("name", None)
    if name:
        for key in ("train_data_path", "data_path", "data_paths"):
            reader.leave_out(key, f"the data set {name} is used")
        path = name if str(name).startswith((".", "/", "~")) else f"hf://{name}"
        if not data_format:
            data_format = HUB_DATA.get(str(name).rpartition("/")[2].lower(), "")
    if reader.get("mock_data", "mock"):
        done.left_out.append("mock data: not supported; `data=demo` is small and real")
        if path is not None:
            done.left_out.append(f"data {path}: mock data are asked for; choose data=FORMAT data.path={path}")
    elif path is None:
        done.left_out.append("no data are set; choose data= and data.path=")
        reader.leave_out("dataset_format", "no data are set")
    elif data_format and _is_option("data", data_format):
        done.choices["data"] = data_format
        done.values["data.path"] = path
    else:
        problem = f"dataset_format={given_format}" if given_format else "no known format"
        packing = "" if done.values.get("data.packing", True) else " data.packing=false"
        done.left_out.append(f"data {path}: {problem}; choose data=FORMAT data.path={path}{packing}")
    if "data" not in done.choices:
        done.values.pop("data.packing", None)
        for key in ("packed_sequence", "valid_data_path", "split"):
            reader.read.add(key)
            reader.leave_out(key, "goes with data, which are yours to choose")
        for key, value in dataset.items():
            done.left_out.append(f"{reader.where('dataset')}.{key}={value}: goes with data, which are yours to choose")
        return
    _translate_validation(reader, done, dataset)
    if "data.packing" not in done.values:
        done.left_out.append(
            "packed_sequence is not set: the default here packs several conversations into a "
            "sequence; for one each, add data.packing=false"
        )


def _dataset(reader: Reader, done: Translation) -> dict[str, Any]:
    """What the file's `dataset` says: `name` of the hub or `path`, and what is set of the validation."""
    given = reader.get("dataset") or {}
    hub_name = reader.get("dataset_name")
    if not isinstance(given, dict):
        dataset = {"path": given}
        if hub_name is not None:
            dataset["name"] = hub_name
        return dataset
    names = [given.get("dataset_name"), given.get("path_or_dataset")]
    if hub_name is not None:
        names.insert(0, hub_name)
    names = [name for name in names if name]
    for name in names[1:]:
        if name != names[0]:
            done.left_out.append(f"{reader.where('dataset')}: {name}: {names[0]} is used")
    dataset = {"name": names[0]} if names else {}
    for key, value in given.items():
        if key in ("do_validation", "val_proportion"):
            dataset[key] = value
        elif key not in ("dataset_name", "path_or_dataset") and value is not None and value is not False:
            done.left_out.append(f"{reader.where('dataset')}.{key}={shown(key, value)}: no counterpart")
    return dataset


def _translate_validation(reader: Reader, done: Translation, dataset: dict[str, Any]) -> None:
    """Validation data: a file of their own, else a fraction of the training data."""
    within = f"{reader.where('dataset')}.val_proportion"
    fraction = dataset.get("val_proportion")
    if fraction and not dataset.get("do_validation", True):
        done.left_out.append(f"{within}={fraction}: do_validation is false")
        fraction = None
    valid_path = reader.get("valid_data_path")
    split = reader.get("split")
    if valid_path:
        done.values["data.validation_path"] = valid_path
        reason = f"{reader.where('valid_data_path')} is used"
        reader.leave_out("split", reason)
        if fraction:
            done.left_out.append(f"{within}={fraction}: {reason}")
        return
    if split and fraction is not None:
        reader.leave_out("split", f"{within} is used")
    elif split:
        fraction = _validation_part(reader, str(split))
    if fraction:
        done.values["data.validation_fraction"] = fraction


def _validation_part(reader: Reader, split: str) -> float | None:
    """The second of a split's parts as a fraction of all; None: it has none."""
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        raise UserError(f"{reader.primus.path}: split={split}: expected numbers such as 95,5,0") from None
    if len(parts) > 2 and parts[2]:
        reader.leave_out("split", "its third part, for tests, is trained on; keep it in a separate file")
    if len(parts) < 2 or not parts[1]:
        return None
    return round(parts[1] / sum(parts), 6)


def _translate_template(reader: Reader, done: Translation) -> None:
    for key in ("prompt_template", "chat_format"):
        name = str(reader.get(key) or "").lower()
        name = TEMPLATES.get(name, name)
        if not name:
            continue
        if not _is_option("template", name):
            reader.leave_out(key, "no such template; choose template=")
        elif done.choices.setdefault("template", name) != name:
            reader.leave_out(key, f"the template is {done.choices['template']}")


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
        reader.leave_out("lr_warmup_iters", f"{reader.where('lr_warmup_fraction')} is used")
    elif warmup is not None:
        values["scheduler.lr_warmup_fraction"] = None
        values["scheduler.lr_warmup_iters"] = warmup

    done.choices["parallelism"] = "ddp"
    sequence_parallel = reader.get("sequence_parallel")
    tensor_size = values.get("parallelism.tensor_model_parallel_size", 1)
    if tensor_size == 1:
        reader.leave_out("sequence_parallel", "has no effect without tensor parallelism")
    elif sequence_parallel is not None:
        values["parallelism.sequence_parallel"] = sequence_parallel
    if reader.get("use_megatron_fsdp", "use_custom_fsdp"):
        values["parallelism.fsdp"] = True
        values["parallelism.distributed_optimizer"] = True
    distributed = reader.get("use_distributed_optimizer")
    if distributed is not None:
        values.setdefault("parallelism.distributed_optimizer", distributed)


def _translate_recompute(reader: Reader, done: Translation) -> None:
    granularity = reader.get("recompute_granularity")
    activations = reader.get("recompute_activations")
    if granularity not in (None, "selective"):
        reader.leave_out("recompute_activations", f"{reader.where('recompute_granularity')} is used")
    elif activations:
        granularity = "selective"
    method = reader.get("recompute_method")
    layers = reader.get("recompute_num_layers")
    if granularity:
        done.values["trainer.recompute"] = granularity
    if granularity != "full":
        for key in ("recompute_method", "recompute_num_layers"):
            reader.leave_out(key, "goes with recompute_granularity: full")
    elif method == "block":
        done.values["trainer.recompute_layers"] = layers or 1
    elif layers not in (1, None):
        reader.leave_out("recompute_num_layers", "layers are computed again one by one")


def _translate_precision(reader: Reader, done: Translation) -> None:
    """The first of precision_config, fp16, fp8 and bf16 that says anything; fp8 is said in addition to the others."""
    named = str(reader.get("precision_config") or "").replace("-", "_")
    flags = {key: bool(reader.get(key)) for key in ("fp16", "fp8", "bf16")}
    kind = named.partition("_")[0]
    if "fp8" in named or "fp4" in named:
        kind = "fp8"
    if named and kind not in ("fp32", *flags):
        reader.leave_out("precision_config", "no such precision; choose precision=")
        kind = ""
    winner = reader.where("precision_config")
    for key, given in flags.items():
        if not given:
            continue
        if not kind or (kind == "bf16" and key == "fp8"):
            kind = key
            winner = reader.where(key)
        elif key != kind and (kind, key) != ("fp8", "bf16"):
            reader.leave_out(key, f"{winner} is used")
    if kind == "fp16":
        done.left_out.append("fp16: not supported; precision=bf16 has the range that fp16 requires loss scaling for")
    if kind == "fp8" and "current" not in named:
        scaled = named or reader.primus.settings["fp8"]
        done.left_out.append(f"{scaled}: fp8 is scaled per tensor by its current values here")
    if kind:
        done.choices["precision"] = {"fp16": "bf16"}.get(kind, kind)


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
    reader.read.add("wandb_entity")
    if project is not None:
        trackers.append("wandb")
        done.values["logger.wandb.project"] = project
    reason = "to whom a run is sent is said on the command line: logger.wandb.entity=NAME, or by WANDB_ENTITY"
    reader.leave_out("wandb_entity", reason)
    if reader.get("tensorboard_dir") is not None:
        trackers.append("tensorboard")
        reader.leave_out("tensorboard_dir", "events are written to RUN_DIR/tensorboard")
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
        elif key in MOMENTS and is_bf16(value):
            reader.leave_out(key, BF16_MOMENTS)
        elif decided.fullmatch(key):
            reader.leave_out(key, "decided by posttrain for the machine")
        elif key == "moe_router_force_load_balancing":
            reader.leave_out(key, "sends tokens to experts at random, for measurements only")
        elif "turbo" in key:
            reader.leave_out(key, "kernels for AMD GPUs")
        elif key in OF_RECIPE:
            reader.leave_out(key, "its values are not in this file; recipe= has Megatron-Bridge's")
        else:
            reader.leave_out(key, "no counterpart")
