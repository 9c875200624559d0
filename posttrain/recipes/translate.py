"""Translate a recipe to this project's keys: the file of each group, the values, and the rest.

Only a recipe's settings of the training itself are taken. What Megatron needs on a given machine
(kernels, fusions, CUDA graphs, where files go) is decided here for the machine at hand. Those
settings are listed, and so is everything that has no counterpart.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import UserError
from posttrain.spec.megatron_keys import KEYS

NULL_INSTEAD_OF_ZERO = (
    "trainer.validation_interval",
    "trainer.validation_batches",
    "checkpoint.save_interval",
)
# Read below, together with other values.
TOGETHER = {
    "scheduler": ("start_weight_decay", "end_weight_decay", "lr_warmup_fraction"),
    "optimizer": ("weight_decay", "use_distributed_optimizer"),
    "ddp": ("use_distributed_optimizer",),
    "model": (
        "sequence_parallel",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
    ),
    "peft": ("target_modules",),
}
# Decided here: for the machine, by the precision, or because losses and files would differ.
DECIDED = {
    "model": r"\w*fusion\w*|attention_backend|attention_softmax_in_fp32|cuda_graph_\w+|use_te_rng_tracker"
    r"|offload_modules|params_dtype|pipeline_dtype|calculate_per_token_loss|persist_layer_norm",
    "optimizer": r"bf16|overlap_param_gather|use_precision_aware_optimizer|store_param_remainders|\w+_dtype",
    "scheduler": r"max_lr|min_lr|override_opt_param_scheduler|lr_warmup_init",
    "ddp": r"overlap_\w+|check_for_\w+|average_in_collective|grad_reduce_in_fp32"
    r"|data_parallel_sharding_strategy",
    "train": r"manual_gc\w*|empty_unused_memory_level",
    "mixed_precision": r"\w*dtype|bf16|fp8\w*",
    "logger": r".*",
    "dist": r".*",
    "tokenizer": r".*",
    "checkpoint": r"save|load|ckpt_\w+|fully_parallel_\w+|dist_ckpt_strictness|async_strategy|save_rng",
}
# Of the optimizer's settings those of which this project leaves the choice to its user.
MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")
BF16_MOMENTS = "moments are in fp32 unless optimizer=adam_bf16 is chosen, for all weights on GPUs"
# Settings that change the model itself, which its Hugging Face form would not show.
ARCHITECTURE = re.compile(r"position_embedding_type|yarn_\w+|mtp_\w+|rotary_\w+|num_layers|hidden_size")
PASSED = ("model", "optimizer")  # sections whose other settings go through trainer.megatron
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}
ALL_LINEAR = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}


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


def translate_recipe(name: str, recipe: dict[str, Any], model_chosen: bool = False) -> Translation:
    """Translate what `resolve.resolve_recipe` returned.

    Args:
        name: of the recipe, for messages.
        recipe: see `resolve.resolve_recipe`.
        model_chosen: whether the command line chooses a model, so that the recipe's own need not be
            known here.

    Raises:
        UserError: the model is not in conf/model, or the recipe changes the model itself.
    """
    hub = recipe["hub"]
    sections = recipe["sections"]
    done = Translation(hub)
    if recipe["option"] is not None:
        done.choices["model"] = recipe["option"]
        _refuse_changed_model(name, sections["model"]["changed"])
    elif not model_chosen:
        raise UserError(
            f"`recipe.name={name}`: trains {hub}, which conf/model does not have. To use its "
            f"settings with a model that you choose: recipe.name={name} model=hf model.path={hub}"
        )
    _translate_peft(name, sections.get("peft"), done)
    for section, keys in KEYS.items():
        given = sections[section]["values"] if section in sections else {}
        for key, path in keys.items():
            if key in given:
                done.values[path] = null_instead_of_zero(path, given[key])
    _translate_training(name, sections, done)
    _translate_data(sections["dataset"]["values"], done)
    _translate_others(sections, done)
    if recipe["env_vars"]:
        variables = " ".join(recipe["env_vars"])
        done.left_out.append(f"environment variables {variables}: set them yourself where you need them")
    return done


def null_instead_of_zero(path: str, value: object) -> object:
    """Return `value` for the key `path`, null where Megatron says "never" with a zero."""
    if path in NULL_INSTEAD_OF_ZERO and not value:
        return None
    return value


def _refuse_changed_model(name: str, changed: list[str]) -> None:
    keys = [key for key in changed if ARCHITECTURE.fullmatch(key)]
    if keys:
        raise UserError(
            f"`recipe.name={name}`: changes the model itself ({', '.join(keys[:3])}, ...), "
            "which its Hugging Face form would not show; start from a different recipe"
        )


def _translate_peft(name: str, peft: dict[str, Any] | None, done: Translation) -> None:
    """Which adapter, on which modules."""
    if peft is None:
        done.choices["peft"] = "none"
        return
    if peft["type"] not in ("LoRA", "DoRA"):
        raise UserError(f"`recipe.name={name}`: trains a {peft['type']}, which `peft=` does not have")
    done.choices["peft"] = peft["type"].lower()
    targets = peft["values"]["target_modules"]
    done.values["peft.target_modules"] = targets
    if set(targets) == ALL_LINEAR:
        done.values["peft.target_modules"] = "all-linear"


def _translate_training(name: str, sections: dict[str, Any], done: Translation) -> None:
    """Settings that Megatron-Bridge spreads over several keys."""
    optimizer = sections["optimizer"]["values"]
    scheduler = sections["scheduler"]["values"]
    values = done.values
    if optimizer["optimizer"] not in ("adam", "sgd"):
        raise UserError(
            f"`recipe.name={name}`: uses the optimizer {optimizer['optimizer']}, which `optimizer=` does not have"
        )
    done.choices["optimizer"] = optimizer["optimizer"]
    # Megatron's scheduler sets the weight decay of every step, whatever the optimizer was given.
    decay = scheduler["end_weight_decay"]
    if decay is None:
        values["optimizer.weight_decay"] = optimizer["weight_decay"]
    else:
        values["optimizer.weight_decay"] = decay
        if scheduler["start_weight_decay"] != decay:
            done.left_out.append(f"scheduler.start_weight_decay={scheduler['start_weight_decay']}")

    style = scheduler["lr_decay_style"]
    done.choices["scheduler"] = SCHEDULERS.get(style, "cosine")
    values["scheduler.lr_warmup_fraction"] = scheduler["lr_warmup_fraction"]
    if scheduler["lr_decay_iters"] == values["trainer.max_steps"]:
        values["scheduler.lr_decay_iters"] = None  # the last step, also of a longer run
    if style != "WSD":
        del values["scheduler.lr_wsd_decay_style"]
        del values["scheduler.lr_wsd_decay_iters"]
    values["trainer.epochs"] = None
    _translate_parallelism(sections, done)
    _translate_precision(name, sections["mixed_precision"]["values"], done)


def _translate_parallelism(sections: dict[str, Any], done: Translation) -> None:
    """How the training is split over GPUs, and what is recomputed to save memory."""
    model = sections["model"]["values"]
    optimizer = sections["optimizer"]["values"]
    ddp = sections["ddp"]["values"]
    values = done.values
    done.choices["parallelism"] = "ddp"
    values["parallelism.sequence_parallel"] = None
    if model["tensor_model_parallel_size"] > 1:
        values["parallelism.sequence_parallel"] = bool(model["sequence_parallel"])
    values["parallelism.distributed_optimizer"] = bool(
        optimizer["use_distributed_optimizer"] or ddp["use_distributed_optimizer"] or ddp["use_megatron_fsdp"]
    )
    values["trainer.recompute"] = model["recompute_granularity"] or "auto"
    if model["recompute_granularity"] == "full":
        layers = model["recompute_num_layers"]
        if model["recompute_method"] == "block":
            values["trainer.recompute_layers"] = layers
        elif layers not in (1, None):
            done.left_out.append(f"model.recompute_num_layers={layers}: layers are computed again one by one")


def _translate_precision(name: str, precision: dict[str, Any], done: Translation) -> None:
    if precision["fp16"]:
        raise UserError(f"`recipe.name={name}`: trains in fp16, which `precision=` does not have")
    if precision["fp8"]:
        done.choices["precision"] = "fp8"
        if precision["fp8_recipe"] != "tensorwise":
            done.left_out.append(f"mixed_precision.fp8_recipe={precision['fp8_recipe']}: fp8 is scaled per tensor here")
    elif precision["bf16"]:
        done.choices["precision"] = "bf16"
    else:
        done.choices["precision"] = "fp32"


def _translate_data(data: dict[str, Any], done: Translation) -> None:
    """The recipe's data: only mentioned, since the hub and Megatron-Bridge prepare them."""
    packed = bool(data.get("enable_offline_packing") or data.get("enable_in_batch_packing"))
    done.values["data.packing"] = packed
    source = data.get("hf_dataset") or {}
    dataset = source.get("dataset_name") or source.get("path_or_dataset") or "data of its own"
    advice = "" if packed else " and data.packing=false"
    done.left_out.append(f"dataset {dataset}: choose data=, data.path={advice}")


def _translate_others(sections: dict[str, Any], done: Translation) -> None:
    """Other changed settings: passed through, decided here, or left out."""
    for section, content in sections.items():
        if section == "dataset":
            continue
        known = {*KEYS.get(section, ()), *TOGETHER.get(section, ())}
        for key in content["changed"]:
            value = content["values"][key]
            if key in known or value is None:
                continue
            if key in content["strays"]:
                done.left_out.append(f"{section}.{key}={value}: Megatron-Bridge itself has no such setting")
            elif key in MOMENTS and is_bf16(value):
                done.left_out.append(f"{section}.{key}={value}: {BF16_MOMENTS}")
            elif re.fullmatch(DECIDED.get(section, ""), key):
                done.decided.append(f"{section}.{key}")
            elif section in PASSED and "<" not in str(value):
                done.values[f"trainer.megatron.{section}.{key}"] = value
            else:
                done.left_out.append(f"{section}.{key}={value}")


def is_bf16(dtype: object) -> bool:
    """Whether a data type, as a recipe (`<torch.bfloat16>`) or a file (`bf16`) has it, is bf16."""
    return str(dtype).strip("<>").removeprefix("torch.") in ("bf16", "bfloat16")
