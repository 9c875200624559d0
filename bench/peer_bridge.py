"""Megatron-Bridge by itself: its LoRA, its optimizer, its loop, its mock data; a peer of bench/peers.py."""

import os

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as Megatron-Core asks for with tensor parallelism

from posttrain import patches

patches.apply(patches.Platform.detect("cuda"))  # which let it start without the packages that text does not need

# isort: split
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import config as c
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from peer_work import Clock, Work, run
from transformers import AutoConfig


class Timing(Callback):
    """Times the steps of upstream's loop."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Begin a step."""
        self.clock.start()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """End it."""
        self.clock.stop()


def provider(work: Work) -> GPTModelProvider:
    """The model with random weights, split as the row says, with LoRA."""
    if work.rank is None:
        raise NotImplementedError("all weights")
    fields = dict(work.architecture)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    model.seq_length = work.seq_length
    model.tensor_model_parallel_size = work.tensor_parallel
    model.sequence_parallel = work.tensor_parallel > 1
    model.pipeline_model_parallel_size = work.pipeline_parallel
    model.pipeline_dtype = torch.bfloat16
    if work.checkpointing:
        model.recompute_granularity = "full"
        model.recompute_method = "uniform"
        model.recompute_num_layers = 1
    # Faster than torch's loss, which its recipes for LoRA have.
    model.cross_entropy_loss_fusion = True
    model.cross_entropy_fusion_impl = "te"
    model.apply_rope_fusion = True
    model.gradient_accumulation_fusion = False
    if work.cuda_graph:  # of each layer, whole
        model.cuda_graph_impl = "transformer_engine"
        model.cuda_graph_modules = []
    adapter = LoRA(dim=work.rank, alpha=work.alpha, dropout=0.0)
    model.register_pre_wrap_hook(lambda parts: adapter(parts, training=True))
    return model


def container(work: Work) -> c.ConfigContainer:
    """The settings of its recipes for LoRA (recipes/common.py, recipes/llama/h100/llama3.py), for this work.

    The recipes themselves can't be imported without the packages of diffusion models.
    """
    no_graph = not work.cuda_graph  # a graph can't look for NaN
    return c.ConfigContainer(
        model=provider(work),
        train=c.TrainingConfig(
            train_iters=work.steps,
            global_batch_size=work.global_batch,
            micro_batch_size=work.micro_batch,
            manual_gc=True,
            manual_gc_interval=100,
        ),
        validation=c.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=c.OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            min_lr=0.0,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=False,
        ),
        scheduler=c.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
        ),
        ddp=c.DistributedDataParallelConfig(
            check_for_nan_in_grad=no_graph,
            use_distributed_optimizer=False,
            grad_reduce_in_fp32=False,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        dataset=c.MockGPTDatasetConfig(
            seq_length=work.seq_length,
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            num_dataset_builder_threads=1,
            split="100,0,0",
            dataloader_type="single",
            num_workers=1,
        ),
        logger=c.LoggerConfig(log_interval=1000),
        tokenizer=c.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=work.architecture["vocab_size"] - 1),
        checkpoint=c.CheckpointConfig(save=None, load=None),
        rng=c.RNGConfig(seed=5678, te_rng_tracker=work.cuda_graph),
        rerun_state_machine=c.RerunStateMachineConfig(check_for_nan_in_loss=no_graph),
        dist=c.DistributedInitConfig(),
        mixed_precision="bf16_mixed",
    )


def train(work: Work) -> Clock:
    """Train as Megatron-Bridge does by itself."""
    timing = Timing()
    pretrain(container(work), forward_step, callbacks=[timing])
    return timing.clock


if __name__ == "__main__":
    run(train)
