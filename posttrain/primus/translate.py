"""What a Primus configuration says, in this project's words."""

import re
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import UserError
from posttrain.primus.read import Primus
from posttrain.recipes.resolve import option_of
from posttrain.recipes.translate import DECIDED, SCHEDULERS

# Primus's key -> ours. Where two are given, the first that the file has.
WORDS = {
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
NOTHING_IS_NULL = ("trainer.validation_interval", "trainer.validation_batches", "checkpoint.save_interval")
PASSED = re.compile(
    r"moe_(?!\w*fus|router_force)\w+|expert_tensor_parallel_size|virtual_pipeline_model_parallel_size|num_layers_in_\w+"
    r"|account_for_\w+|recompute_modules|cp_comm_type"
)
HUB_DATA = {  # data sets that are named in Primus's examples -> format
    "alpaca": "alpaca",
    "alpaca-cleaned": "alpaca",
    "databricks-dolly-15k": "dolly",
    "oasst1": "oasst",
}
FORMATS = {"openai": "messages", "chatml": "messages", "jsonl": "prompt_completion"}
TEMPLATES = {"qwen": "chatml", "chatml": "chatml"}
SECRET = re.compile(r"(?i)token$|secret|password|api_key")  # values that no message repeats
# Settings that say what is so here anyway.
SETTLED = {
    "save_lora_only", "finetune", "stage", "trainable", "task", "stderr_sink_level", "file_sink_level", "sink_level",
    "log_throughput", "recipe", "flavor", "use_checkpoint_args", "exit_on_missing_checkpoint",
}  # fmt: skip


@dataclass
class Translation:
    """A run in this project's words.

    Attributes:
        choices: group -> file, or list of files.
        values: key path -> value.
        run_dir: where the file wants its checkpoints.
        left_out: what has no counterpart, and why.
    """

    choices: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    run_dir: str | None = None
    left_out: list[str] = field(default_factory=list)


class Reader:
    """The settings of a file, with those that have been read told from the others."""

    def __init__(self, primus: Primus) -> None:
        self.primus, self.taken = primus, set(SETTLED)

    def get(self, *keys: str) -> Any:
        """The first of `keys` that is set, all of them taken."""
        self.taken.update(keys)
        return next((self.primus.settings[key] for key in keys if self.primus.settings.get(key) is not None), None)

    def say(self, key: str, why: str) -> str:
        """A line about a setting that is not taken over."""
        value = "..." if SECRET.search(key) else self.primus.settings[key]
        return f"{self.primus.where.get(key, key)}={value}: {why}"


def translate(primus: Primus, model: str | None = None) -> Translation:
    """Translate a file.

    Args:
        primus: the file's settings.
        model: what the command line says the model is, so that the file need not; None: nothing.

    Raises:
        UserError: the file does not say which model it is, in a form that can be used here; or a value is none.
    """
    done, reader = Translation(), Reader(primus)
    _peft(reader, done)
    for key, path in WORDS.items():
        value = reader.get(key)
        if path not in done.values and key in primus.settings and (value is not None or path.startswith("scheduler")):
            done.values[path] = None if path in NOTHING_IS_NULL and not value else value
    if done.choices["peft"] == "none":
        for path in [path for path in done.values if path.startswith("peft.")]:
            del done.values[path]
    _model(reader, done, model)
    _data(reader, done)
    _training(reader, done)
    _files(reader, done)
    _rest(reader, done)
    return done


def _peft(reader: Reader, done: Translation) -> None:
    kind, used = reader.get("peft"), reader.get("use_lora")
    if kind is None and used is None:  # Primus's models for LoRA have it in their name
        named = "lora" in (reader.primus.preset or "").lower()
        used = named or bool({"lora_rank", "peft_dim"} & reader.primus.settings.keys())
    kind = str(kind).lower() if kind is not None else "lora" if used else "none"
    if kind not in ("none", "lora", "dora"):
        raise UserError(f"{reader.primus.path}: peft={kind}: `peft=` here is lora, dora or none")
    done.choices["peft"] = kind


def _model(reader: Reader, done: Translation, model: str | None) -> None:
    """The model's Hugging Face name: from the file, or from the name of its preset."""
    hub = reader.get("hf_model_name_or_path", "hf_path", "hf_model_path")
    reader.taken.add("convert_from_hf")
    for key in ("load", "pretrained_checkpoint"):
        if reader.get(key) is not None:
            done.left_out.append(
                reader.say(key, "a Megatron checkpoint; a run here starts from Hugging Face's form, see docs/primus.md")
            )
    option = option_of(hub) if hub else by_name(reader.primus.preset)
    if model is not None:
        return
    if option is not None:
        done.choices["model"] = option
    elif hub is not None:
        done.choices["model"], done.values["model.path"] = "hf", str(hub)
    else:
        raise UserError(
            f"{reader.primus.path}: does not say which model it is in Hugging Face's form"
            + (f" (`{reader.primus.preset}` is none of conf/model)" if reader.primus.preset else "")
            + "; add model=NAME or model=hf model.path=DIR to the command"
        )


def by_name(preset: str | None) -> str | None:
    """The file of conf/model that a preset of Primus's means: llama3.1_8B, llama31_8b_lora and the like."""
    from posttrain.compose import CONF_DIR

    name = re.sub(r"_(lora|sft|mxfp4|fp8|bf16)\b.*", "", (preset or "").lower()).replace(".", "")
    return name if name and (CONF_DIR / "model" / f"{name}.yaml").is_file() else None


def _data(reader: Reader, done: Translation) -> None:
    """The file or hub data set, its format, its split and the template."""
    from posttrain.compose import CONF_DIR

    def known(group: str, name: str) -> bool:
        return (CONF_DIR / group / f"{name}.yaml").is_file()

    path = reader.get("train_data_path", "data_path", "data_paths")
    dataset = reader.get("dataset") or {}
    if not isinstance(dataset, dict):
        path, dataset = path or dataset, {}
    if (named := reader.get("dataset_name")) is not None:
        dataset = {**dataset, "dataset_name": named}
    wanted = str(reader.get("dataset_format") or "").lower()
    kind = FORMATS.get(wanted, wanted)
    fraction = dataset.get("val_proportion") if dataset.get("do_validation", True) else None
    if name := dataset.get("dataset_name") or (dataset.get("path_or_dataset") if dataset else None):
        path = name if str(name).startswith((".", "/", "~")) else f"hf://{name}"
        kind = kind or HUB_DATA.get(str(name).rpartition("/")[2].lower(), "")
    if reader.get("mock_data", "mock"):
        done.left_out.append("mock data: this project has no random data; `data=demo` is small and real")
    elif path is None:
        done.left_out.append("no data are named; choose data= and data.path=")
    elif kind and known("data", kind):
        done.choices["data"], done.values["data.path"] = kind, path
    else:
        said = f"dataset_format={wanted}" if wanted else "no format that is known here"
        packing = "" if done.values.get("data.packing", True) else " data.packing=false"
        done.left_out.append(f"data {path}: {said}; choose data=FORMAT data.path={path}{packing}")
    if "data" in done.choices:
        if valid := reader.get("valid_data_path"):
            done.values["data.validation_path"] = valid
        elif (split := reader.get("split")) and fraction is None:
            try:
                parts = [float(part) for part in str(split).split(",")]
            except ValueError:
                raise UserError(f"{reader.primus.path}: split={split}: numbers such as 95,5,0 were expected") from None
            fraction = round(parts[1] / sum(parts), 6) if len(parts) > 1 and parts[1] else None
            if len(parts) > 2 and parts[2]:
                done.left_out.append(reader.say("split", "its third part, for tests, is trained on; keep it in a file"))
        if fraction and "data.validation_path" not in done.values:
            done.values["data.validation_fraction"] = fraction
        if "data.packing" not in done.values:
            done.left_out.append(
                "packed_sequence is not said: a row of the batch holds several conversations here; one each with "
                "data.packing=false"
            )
    else:
        done.values.pop("data.packing", None)
    for key in ("prompt_template", "chat_format"):
        name = str(reader.get(key) or "").lower()
        name = TEMPLATES.get(name, name)
        if name and known("template", name) and done.choices.setdefault("template", name) != name:
            done.left_out.append(reader.say(key, f"the template is {done.choices['template']}"))
        elif name and not known("template", name):
            done.left_out.append(reader.say(key, "no such template; choose template="))


def _training(reader: Reader, done: Translation) -> None:
    """Settings that mean something together."""
    values, path = done.values, reader.primus.path
    optimizer = str(reader.get("optimizer") or "adam")
    if optimizer not in ("adam", "sgd"):
        raise UserError(f"{path}: optimizer={optimizer}: `optimizer=` here is adam or sgd")
    done.choices["optimizer"] = optimizer
    style = str(reader.get("lr_decay_style") or "cosine")
    if style not in SCHEDULERS:
        raise UserError(f"{path}: lr_decay_style={style}: `scheduler=` here is {', '.join(SCHEDULERS)}")
    done.choices["scheduler"] = SCHEDULERS[style]
    fraction, warmup = reader.get("lr_warmup_fraction"), reader.get("lr_warmup_iters")
    if fraction is not None or warmup is not None:
        values["scheduler.lr_warmup_fraction"] = fraction
        values["scheduler.lr_warmup_iters"] = 0 if fraction is not None else warmup

    done.choices["parallelism"] = "ddp"
    sequence, tensor = reader.get("sequence_parallel"), values.get("parallelism.tensor_model_parallel_size", 1)
    if sequence is not None and tensor > 1:
        values["parallelism.sequence_parallel"] = sequence
    if reader.get("use_megatron_fsdp", "use_custom_fsdp"):
        values["parallelism.fsdp"] = values["parallelism.distributed_optimizer"] = True
    if (distributed := reader.get("use_distributed_optimizer")) is not None:
        values.setdefault("parallelism.distributed_optimizer", distributed)

    granularity = reader.get("recompute_granularity") or ("selective" if reader.get("recompute_activations") else None)
    reader.taken.update(("recompute_granularity", "recompute_activations"))
    method, layers = reader.get("recompute_method"), reader.get("recompute_num_layers")
    if granularity:
        values["trainer.recompute"] = granularity
        if granularity == "full" and (method, layers) not in ((None, None), ("uniform", 1)):
            values["trainer.megatron.model.recompute_method"] = method or "uniform"
            values["trainer.megatron.model.recompute_num_layers"] = layers or 1

    precision = str(reader.get("precision_config") or "").replace("-", "_")
    fp8, fp16, bf16 = reader.get("fp8"), reader.get("fp16"), reader.get("bf16")
    if precision.startswith("fp16") or fp16:
        done.left_out.append("fp16: there is none here; precision=bf16 has the range that fp16 needs loss scaling for")
        done.choices["precision"] = "bf16"
    elif "fp8" in precision or "fp4" in precision or fp8:
        done.choices["precision"] = "fp8"
        if "current" not in precision:
            done.left_out.append(f"{precision or fp8}: fp8 is scaled per tensor by its current values here")
    elif precision.startswith("bf16") or bf16:
        done.choices["precision"] = "bf16"
    elif precision.startswith("fp32"):
        done.choices["precision"] = "fp32"


def _files(reader: Reader, done: Translation) -> None:
    """Where results go, and trackers."""
    if (save := reader.get("save")) is not None:
        done.run_dir = str(save)
    if reader.get("skip_save"):
        done.values["checkpoint.save"] = False
    if reader.get("no_save_optim"):
        done.values["checkpoint.save_optimizer"] = False
    if (target := reader.get("hf_save_path")) is not None:
        where = (
            "RUN_DIR/hf" if done.choices["peft"] == "none" else "RUN_DIR/adapter; docs/primus.md says how to merge it"
        )
        done.left_out.append(f"hf_save_path={target}: the result is {where}")
    trackers = []
    if (project := reader.get("wandb_project")) is not None:
        trackers.append("wandb")
        done.values["logger.wandb.project"] = project
        if (entity := reader.get("wandb_entity")) is not None:
            done.values["logger.wandb.entity"] = entity
    reader.taken.add("wandb_entity")
    if reader.get("tensorboard_dir") is not None:
        trackers.append("tensorboard")
        done.left_out.append(reader.say("tensorboard_dir", "events are written to RUN_DIR/tensorboard"))
    if trackers:
        done.choices["logger"] = trackers


def _rest(reader: Reader, done: Translation) -> None:
    """Every setting that nothing above has read: passed through to Megatron-Bridge, decided here, or left out.

    What is null or false asks for nothing and is not mentioned.
    """
    sections = ("model", "optimizer", "scheduler", "ddp", "train", "checkpoint")
    decided = re.compile("|".join([*(DECIDED[section] for section in sections), "no_save_rng", r"no_load_\w+"]))
    for key, value in reader.primus.settings.items():
        if key in reader.taken or value is None or value is False:
            continue
        if PASSED.fullmatch(key):
            done.values[f"trainer.megatron.model.{key}"] = value
        elif decided.fullmatch(key):
            done.left_out.append(reader.say(key, "decided by posttrain for the machine"))
        elif key == "moe_router_force_load_balancing":
            done.left_out.append(reader.say(key, "sends tokens to experts at random, for measurements only"))
        elif "turbo" in key:
            done.left_out.append(reader.say(key, "kernels for AMD's GPUs"))
        else:
            done.left_out.append(reader.say(key, "no counterpart"))
