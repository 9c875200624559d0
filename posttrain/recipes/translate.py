"""A recipe in this project's words: which file of each group, which values, and what of it is not carried over.

Only what a recipe says about the training is taken. What Megatron needs on a given machine (kernels, fusions, CUDA
graphs, where files go) is decided here for the machine at hand; those settings are named, and so is everything that has
no place.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import UserError

# section -> key there -> key here; values are taken as they are.
WORDS = {
    "train": {
        "train_iters": "trainer.max_steps",
        "global_batch_size": "trainer.global_batch_size",
        "micro_batch_size": "trainer.micro_batch_size",
    },
    "validation": {"eval_interval": "trainer.validation_interval", "eval_iters": "trainer.validation_batches"},
    "logger": {"log_interval": "trainer.log_interval"},
    "rng": {"seed": "seed"},
    "checkpoint": {
        "save_interval": "checkpoint.save_interval",
        "save_optim": "checkpoint.save_optimizer",
        "async_save": "checkpoint.async_save",
    },
    "optimizer": {
        key: f"optimizer.{key}"
        for key in ("optimizer", "lr", "min_lr", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad")
    },
    "scheduler": {
        key: f"scheduler.{key}"
        for key in ("lr_decay_style", "lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters", "lr_wsd_decay_style")
    },
    "model": {
        "seq_length": "trainer.seq_length",
        **{
            f"{kind}_parallel_size": f"parallelism.{kind}_parallel_size"
            for kind in ("tensor_model", "pipeline_model", "context", "expert_model")
        },
    },
    "ddp": {"use_megatron_fsdp": "parallelism.fsdp"},
    "peft": {"dim": "peft.rank", "alpha": "peft.alpha", "dropout": "peft.dropout"},
}
NOTHING_IS_NULL = ("trainer.validation_interval", "trainer.validation_batches", "checkpoint.save_interval")
# Read below, together with other values.
TOGETHER = {
    "scheduler": ("start_weight_decay", "end_weight_decay", "lr_warmup_fraction"),
    "optimizer": ("weight_decay", "use_distributed_optimizer"),
    "ddp": ("use_distributed_optimizer",),
    "model": ("sequence_parallel", "recompute_granularity", "recompute_method", "recompute_num_layers"),
    "peft": ("target_modules",),
}
# Decided here: for the machine, by the precision, or because the loss and the files would be others.
DECIDED = {
    "model": r"\w*fusion\w*|attention_backend|attention_softmax_in_fp32|cuda_graph_\w+|use_te_rng_tracker"
    r"|offload_modules|params_dtype|pipeline_dtype|calculate_per_token_loss|persist_layer_norm",
    "optimizer": r"bf16|overlap_param_gather",
    "scheduler": r"max_lr|min_lr|override_opt_param_scheduler|lr_warmup_init",
    "ddp": r"overlap_\w+|check_for_\w+|average_in_collective|grad_reduce_in_fp32|data_parallel_sharding_strategy",
    "train": r"manual_gc\w*|empty_unused_memory_level",
    "mixed_precision": r"\w*dtype|bf16|fp8\w*",
    "logger": r".*",
    "dist": r".*",
    "tokenizer": r".*",
    "checkpoint": r"save|load|ckpt_\w+|fully_parallel_\w+|dist_ckpt_strictness|async_strategy|save_rng",
}
# What makes another model of it. Hugging Face's form of the model would not say so.
ARCHITECTURE = re.compile(r"position_embedding_type|yarn_\w+|mtp_\w+|rotary_\w+|num_layers|hidden_size")
PASSED = ("model", "optimizer")  # sections whose other settings go through trainer.megatron
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}
WHOLE_MATRICES = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}


@dataclass
class Translation:
    """A recipe as a layer of configuration.

    Attributes:
        hub: the model's hub id.
        choices: group -> file.
        values: key path -> value.
        decided: settings that are decided here instead, `section.key`.
        left_out: settings that have no counterpart, `section.key=value` or a sentence.
    """

    hub: str
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    decided: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def translate(name: str, recipe: dict[str, Any], model_chosen: bool = False) -> Translation:
    """Say what `resolve.resolved` returned in this project's words.

    Args:
        name: of the recipe, for messages.
        recipe: see `resolve.resolved`.
        model_chosen: whether the command line chooses a model, so that the recipe's own need not be known here.

    Raises:
        UserError: the model is none of conf/model, or the recipe changes the model itself.
    """
    hub, sections = recipe["hub"], recipe["sections"]
    if recipe["option"] is None and not model_chosen:
        raise UserError(
            f"`recipe.name={name}`: trains {hub}, which conf/model does not have. Its settings with a model that you "
            f"choose: recipe.name={name} model=hf model.path={hub}"
        )
    done = Translation(hub)
    if recipe["option"] is not None:
        done.choices["model"] = recipe["option"]
        changed = [key for key in sections["model"]["changed"] if ARCHITECTURE.fullmatch(key)]
        if changed:
            raise UserError(
                f"`recipe.name={name}`: changes the model itself ({', '.join(changed[:3])}, ...), which its Hugging "
                "Face form would not have; start from another recipe"
            )
    _peft(name, sections.get("peft"), done)
    for section, words in WORDS.items():
        for key, path in words.items():
            if section in sections and key in sections[section]["values"]:
                value = sections[section]["values"][key]
                done.values[path] = None if path in NOTHING_IS_NULL and not value else value
    _training(name, sections, done)
    _data(sections["dataset"]["values"], done)
    _others(sections, done)
    if recipe["env_vars"]:
        done.left_out.append(
            f"environment variables {' '.join(recipe['env_vars'])}: set them yourself where you need them"
        )
    return done


def _peft(name: str, peft: dict[str, Any] | None, done: Translation) -> None:
    """Which adapter, on which modules."""
    if peft is None:
        done.choices["peft"] = "none"
        return
    if peft["type"] not in ("LoRA", "DoRA"):
        raise UserError(f"`recipe.name={name}`: trains a {peft['type']}, which `peft=` does not have")
    done.choices["peft"] = peft["type"].lower()
    targets = peft["values"]["target_modules"]
    done.values["peft.target_modules"] = "all-linear" if set(targets) == WHOLE_MATRICES else targets


def _training(name: str, sections: dict[str, Any], done: Translation) -> None:
    """What several of Megatron-Bridge's settings say together."""
    model, optimizer, scheduler, ddp, precision = (
        sections[key]["values"] for key in ("model", "optimizer", "scheduler", "ddp", "mixed_precision")
    )
    values = done.values
    if optimizer["optimizer"] not in ("adam", "sgd"):
        raise UserError(f"`recipe.name={name}`: its optimizer {optimizer['optimizer']} is none of `optimizer=`")
    done.choices["optimizer"] = optimizer["optimizer"]
    # Megatron's scheduler sets the weight decay of every step, whatever the optimizer was given.
    decay = scheduler["end_weight_decay"]
    values["optimizer.weight_decay"] = optimizer["weight_decay"] if decay is None else decay
    if decay is not None and scheduler["start_weight_decay"] != decay:
        done.left_out.append(f"scheduler.start_weight_decay={scheduler['start_weight_decay']}")

    style = scheduler["lr_decay_style"]
    done.choices["scheduler"] = SCHEDULERS.get(style, "cosine")
    values["scheduler.lr_warmup_fraction"] = scheduler["lr_warmup_fraction"]
    if scheduler["lr_decay_iters"] == values["trainer.max_steps"]:
        values["scheduler.lr_decay_iters"] = None  # the last step, also of a longer run
    if style != "WSD":
        del values["scheduler.lr_wsd_decay_style"], values["scheduler.lr_wsd_decay_iters"]

    done.choices["parallelism"] = "ddp"
    tensor = model["tensor_model_parallel_size"]
    values["parallelism.sequence_parallel"] = bool(model["sequence_parallel"]) if tensor > 1 else None
    values["parallelism.distributed_optimizer"] = bool(
        optimizer["use_distributed_optimizer"] or ddp["use_distributed_optimizer"] or ddp["use_megatron_fsdp"]
    )
    values["trainer.recompute"] = model["recompute_granularity"] or "none"
    if model["recompute_granularity"] == "full":
        for key, own in (("recompute_method", "uniform"), ("recompute_num_layers", 1)):
            if model[key] not in (own, None):
                values[f"trainer.megatron.model.{key}"] = model[key]
    values["trainer.epochs"] = None

    if precision["fp16"]:
        raise UserError(f"`recipe.name={name}`: trains in fp16, which `precision=` does not have")
    done.choices["precision"] = "fp8" if precision["fp8"] else "bf16" if precision["bf16"] else "fp32"
    if precision["fp8"] and precision["fp8_recipe"] != "tensorwise":
        done.left_out.append(f"mixed_precision.fp8_recipe={precision['fp8_recipe']}: fp8 is scaled per tensor here")


def _data(data: dict[str, Any], done: Translation) -> None:
    """The recipe's data: named, since their preparation is the hub's and Megatron-Bridge's."""
    packed = bool(data.get("enable_offline_packing") or data.get("enable_in_batch_packing"))
    done.values["data.packing"] = packed
    source = data.get("hf_dataset") or {}
    what = source.get("dataset_name") or source.get("path_or_dataset") or "data of its own"
    advice = "" if packed else " and data.packing=false"
    done.left_out.append(f"dataset {what}: choose data=, data.path={advice}")


def _others(sections: dict[str, Any], done: Translation) -> None:
    """Every other setting that isn't Megatron-Bridge's default: passed through, decided here, or left out."""
    for section, content in sections.items():
        if section == "dataset":
            continue
        known = {*WORDS.get(section, ()), *TOGETHER.get(section, ())}
        for key in content["changed"]:
            value = content["values"][key]
            if key in known or value is None:
                continue
            if key in content["strays"]:
                done.left_out.append(f"{section}.{key}={value}: Megatron-Bridge itself has no such setting")
            elif re.fullmatch(DECIDED.get(section, ""), key):
                done.decided.append(f"{section}.{key}")
            elif section in PASSED and "<" not in str(value):
                done.values[f"trainer.megatron.{section}.{key}"] = value
            else:
                done.left_out.append(f"{section}.{key}={value}")
