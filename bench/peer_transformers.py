"""Transformers, with PEFT's LoRA or all weights, on one GPU or sharded by FSDP2: a peer of bench/peers.py."""

import torch
from peer_work import Clock, Work, run, train_loop
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # parameters, each of all experts of a layer


def random_model(work: Work, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights, made on the device; the same in every process."""
    fields = dict(work.architecture)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    torch.manual_seed(0)
    with work.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=work.attention)


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether it has experts."""
    return any(name.endswith(EXPERTS[0]) for name, _ in model.named_parameters())


def add_liger(model: PreTrainedModel) -> None:
    """Have the model use Liger's kernels, as the Trainer does with use_liger_kernel=True.

    Experts stay Transformers' grouped products: Liger's compute the gradients of frozen weights too.
    """
    apply_liger_kernel(model, {"swiglu": False} if is_mixture(model) else None)
    if "forward" not in vars(model):
        raise NotImplementedError(f"Liger has no kernels for {model.config.model_type}")


def add_lora(work: Work, model: PreTrainedModel) -> torch.nn.Module:
    """Return the model with LoRA on all linear layers: of a mixture attention and experts, not the router."""
    modules: str | list[str] = "all-linear"
    parameters = None
    if is_mixture(model):
        modules = ATTENTION
        if work.experts:
            parameters = EXPERTS
    adapter = LoraConfig(
        r=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter, autocast_adapter_dtype=work.autocast)


def shard(model: torch.nn.Module, layer_classes: set[str]) -> None:
    """Shard each layer, and what is outside of them, over all processes.

    Products are in bf16, sums of gradients in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def train(work: Work) -> Clock:
    """Build the model and train it."""
    dtype = torch.bfloat16 if work.rank else torch.float32  # all weights: fp32 ones, as the Trainer has with bf16=True
    model = random_model(work, dtype)
    layer_classes = set(model._no_split_modules)
    vocabulary = model.config.vocab_size
    if work.liger:
        add_liger(model)
    if work.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if work.rank:
        model = add_lora(work, model)
    if work.gpus == 1:
        return train_loop(work, model, vocabulary)
    torch.distributed.init_process_group()
    shard(model, layer_classes)

    def before(last: bool) -> None:
        # The sum of all weights' gradients would be held whole until the last; that of adapters is small.
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last or not work.rank)

    return train_loop(work, model, vocabulary, before)


if __name__ == "__main__":
    run(train)
