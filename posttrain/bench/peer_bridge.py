"""Megatron-Bridge by itself: its LoRA, its loop, its mock data."""

import os
import time
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import config as c
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from transformers import AutoConfig

from posttrain.bench.peer_loop import wait_for_turn
from posttrain.bench.workloads import RANK, SHAPES, Workload
from posttrain.launch.nodes import reserve_port


def run(workload: Workload, steps: int) -> dict[str, Any]:
    """Train as Megatron-Bridge does by itself."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    wait_for_turn()
    port = reserve_port()
    os.environ["MASTER_PORT"] = str(port.getsockname()[1])
    fields = dict(SHAPES[workload.shape])
    config = AutoConfig.for_model(fields.pop("model_type"), architectures=["LlamaForCausalLM"], **fields)
    model = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    model.seq_length = workload.length
    model.cross_entropy_loss_fusion = True
    model.cross_entropy_fusion_impl = "te"
    model.apply_rope_fusion = True
    model.gradient_accumulation_fusion = False
    if not workload.full:
        adapter = LoRA(dim=RANK, alpha=2 * RANK)
        model.register_pre_wrap_hook(lambda parts: adapter(parts, training=True))
    seconds: list[float] = []

    class Clock(Callback):
        def on_train_step_start(self, context: CallbackContext) -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_train_step_end(self, context: CallbackContext) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    container = _container(workload, model, steps)
    pretrain(container, forward_step, callbacks=[Clock()])
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def _container(workload: Workload, model: GPTModelProvider, steps: int) -> c.ConfigContainer:
    precision = "bf16_with_fp8_current_scaling_mixed" if workload.fp8 else "bf16_mixed"
    return c.ConfigContainer(
        model=model,
        train=c.TrainingConfig(
            train_iters=steps,
            global_batch_size=workload.global_batch_size,
            micro_batch_size=workload.micro,
            manual_gc=True,
            manual_gc_interval=100,
        ),
        validation=c.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=c.OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            min_lr=0.0,
            weight_decay=0.0,
            use_distributed_optimizer=workload.full,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
        ),
        scheduler=c.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
            weight_decay_incr_style="constant",
        ),
        ddp=c.DistributedDataParallelConfig(
            use_distributed_optimizer=workload.full,
            grad_reduce_in_fp32=workload.full,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        dataset=c.MockGPTDatasetConfig(
            seq_length=workload.length,
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            num_dataset_builder_threads=1,
            split="100,0,0",
            dataloader_type="single",
            num_workers=1,
        ),
        logger=c.LoggerConfig(log_interval=100),
        tokenizer=c.TokenizerConfig(
            tokenizer_type="NullTokenizer",
            vocab_size=SHAPES[workload.shape]["vocab_size"] - 1,
        ),
        checkpoint=c.CheckpointConfig(save=None, load=None),
        rng=c.RNGConfig(seed=1),
        dist=c.DistributedInitConfig(),
        mixed_precision=precision,
    )
