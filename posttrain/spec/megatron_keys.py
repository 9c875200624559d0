"""Settings of Megatron-Bridge that have a key of their own here: recipes are translated to it, and it alone sets them.

Batches, layout and plan follow from this project's keys. If `trainer.megatron` set the same things once more, Megatron
would be given one value and all else the other.
"""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError

# section -> key there -> key here; values mean the same.
KEYS = {
    "train": {
        "train_iters": "trainer.max_steps",
        "global_batch_size": "trainer.global_batch_size",
        "micro_batch_size": "trainer.micro_batch_size",
    },
    "validation": {
        "eval_interval": "trainer.validation_interval",
        "eval_iters": "trainer.validation_batches",
    },
    "logger": {"log_interval": "trainer.log_interval"},
    "rng": {"seed": "seed"},
    "checkpoint": {
        "save_interval": "checkpoint.save_interval",
        "save_optim": "checkpoint.save_optimizer",
        "async_save": "checkpoint.async_save",
    },
    "optimizer": {
        "optimizer": "optimizer.optimizer",
        "lr": "optimizer.lr",
        "min_lr": "optimizer.min_lr",
        "adam_beta1": "optimizer.adam_beta1",
        "adam_beta2": "optimizer.adam_beta2",
        "adam_eps": "optimizer.adam_eps",
        "sgd_momentum": "optimizer.sgd_momentum",
        "clip_grad": "optimizer.clip_grad",
    },
    "scheduler": {
        "lr_decay_style": "scheduler.lr_decay_style",
        "lr_warmup_iters": "scheduler.lr_warmup_iters",
        "lr_decay_iters": "scheduler.lr_decay_iters",
        "lr_wsd_decay_iters": "scheduler.lr_wsd_decay_iters",
        "lr_wsd_decay_style": "scheduler.lr_wsd_decay_style",
    },
    "model": {
        "seq_length": "trainer.seq_length",
        "tensor_model_parallel_size": "parallelism.tensor_model_parallel_size",
        "pipeline_model_parallel_size": "parallelism.pipeline_model_parallel_size",
        "context_parallel_size": "parallelism.context_parallel_size",
        "expert_model_parallel_size": "parallelism.expert_model_parallel_size",
    },
    "ddp": {"use_megatron_fsdp": "parallelism.fsdp"},
    "peft": {"dim": "peft.rank", "alpha": "peft.alpha", "dropout": "peft.dropout"},
}
SOME_LAYERS = "trainer.recompute=full and, for some of the layers, trainer.recompute_layers"
# The same, but what the key here means depends on several of these.
RELATED = {
    "model": {
        "sequence_parallel": "parallelism.sequence_parallel",
        "recompute_granularity": "trainer.recompute",
        "recompute_method": SOME_LAYERS,
        "recompute_num_layers": SOME_LAYERS,
        "cpu_offloading": "trainer.offload_layers",
        "cpu_offloading_num_layers": "trainer.offload_layers",
    },
    "optimizer": {
        "weight_decay": "optimizer.weight_decay",
        "use_distributed_optimizer": "parallelism.distributed_optimizer",
        "use_precision_aware_optimizer": "optimizer.use_precision_aware_optimizer",
    },
    "ddp": {"use_distributed_optimizer": "parallelism.distributed_optimizer"},
    "scheduler": {"lr_warmup_fraction": "scheduler.lr_warmup_fraction"},
}
# What has no key here, and changes memory or time: the plan is of a run without it.
UNCOUNTED = {
    "model": (
        "recompute_modules",
        "moe_layer_recompute",
        "distribute_saved_activations",
        "fine_grained_activation_offloading",
    ),
    "optimizer": ("optimizer_cpu_offload", "optimizer_offload_fraction"),
    "ddp": ("data_parallel_sharding_strategy",),
}


def uncounted_keys(sections: Mapping[str, Any]) -> list[str]:
    """The keys in `trainer.megatron` that change memory or time, and that the plan doesn't count.

    Args:
        sections: of Megatron-Bridge's configuration, each with its keys.
    """
    found = []
    for section, keys in UNCOUNTED.items():
        values = sections.get(section, {})
        for key in keys:
            if values.get(key):
                found.append(f"trainer.megatron.{section}.{key}")
    return found


def check_own_keys(sections: Mapping[str, Any]) -> None:
    """Refuse in `trainer.megatron` what has a key of its own.

    Args:
        sections: of Megatron-Bridge's configuration, each with its keys.

    Raises:
        UserError: naming the key here.
    """
    for section, values in sections.items():
        own = {**KEYS.get(section, {}), **RELATED.get(section, {})}
        for key in values:
            if key in own:
                raise UserError(
                    f"`trainer.megatron.{section}.{key}`: has a key of its own here, from which batches, layout and "
                    f"plan are made; set {own[key]} instead"
                )
