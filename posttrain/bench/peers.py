"""The others' training loops: `python -m posttrain.bench.peers SIDE ROW STEPS`, a process for each.

They train random full-length sequences in bf16 with AdamW and clipped gradients, the best case for
them. A process imports first, writes a line, and waits for one, so that the imports of all may
overlap and no two use the GPU at once. The last line is a JSON object: seconds of each step,
peak_gib.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from posttrain.bench.workloads import RANK, SHAPES, WORKLOADS, Workload

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.callbacks import CallbackContext
    from megatron.bridge.training.config import ConfigContainer
    from transformers import PreTrainedModel


def wait_for_turn() -> None:
    """Tell that all is imported, and wait for a line."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit(0)


def measure(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Time `step`, waiting for the device after each."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def run_loop(workload: Workload, model: "PreTrainedModel", steps: int, autocast: bool = False) -> dict[str, Any]:
    """A plain loop over a Hugging Face model."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    vocab_size = SHAPES[workload.shape]["vocab_size"]

    def step() -> None:
        for _ in range(workload.accumulation):
            ids = torch.randint(0, vocab_size, (workload.micro, workload.length), device="cuda")
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss / workload.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(step, steps)


def random_model(workload: Workload) -> "PreTrainedModel":
    """Return a transformers model with random bf16 weights on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = dict(SHAPES[workload.shape])
    del fields["model_type"]
    config = LlamaConfig(**fields, attn_implementation="sdpa")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def hf(workload: Workload, steps: int, liger: bool = False) -> dict[str, Any]:
    """transformers and PEFT, SDPA's flash kernel."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from peft import LoraConfig, get_peft_model

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    wait_for_turn()
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return run_loop(workload, get_peft_model(random_model(workload), adapter), steps)


def liger(workload: Workload, steps: int) -> dict[str, Any]:
    """transformers and PEFT with Liger's kernels."""
    return hf(workload, steps, liger=True)


def unsloth(workload: Workload, steps: int) -> dict[str, Any]:
    """Unsloth without gradient checkpointing; it requires a directory with weights and tokenizer."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    import unsloth  # noqa: F401
    from transformers import AutoTokenizer
    from unsloth import FastLanguageModel

    wait_for_turn()
    with tempfile.TemporaryDirectory() as folder:
        random_model(workload).save_pretrained(folder)
        AutoTokenizer.from_pretrained(os.environ["POSTTRAIN_BENCH_TOKENIZER"]).save_pretrained(folder)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            model_name=folder,
            max_seq_length=workload.length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            local_files_only=True,
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        bias="none",
        random_state=0,
        target_modules=names,
        use_gradient_checkpointing=False,
    )
    return run_loop(workload, model, steps, autocast=True)


def bridge(workload: Workload, steps: int) -> dict[str, Any]:
    """Megatron-Bridge by itself: its LoRA, its loop, its mock data.

    This project's patches make its import faster.
    """
    from posttrain import patches

    patches.apply(patches.Platform.detect("cuda"))
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from transformers import AutoConfig

    from posttrain.launch.nodes import reserve_port

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
        def on_train_step_start(self, context: "CallbackContext") -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_train_step_end(self, context: "CallbackContext") -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    config = _bridge_config(workload, model, steps)
    pretrain(config, forward_step, callbacks=[Clock()])
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def _bridge_config(workload: Workload, model: "GPTModelProvider", steps: int) -> "ConfigContainer":
    from megatron.bridge.training import config as c

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


PEERS = {"bridge": bridge, "hf": hf, "liger": liger, "unsloth": unsloth}


def main() -> None:
    """Measure one side of one workload."""
    side, name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    workload = next(workload for workload in WORKLOADS if workload.name == name)
    result = PEERS[side](workload, steps)
    warm = result["seconds"][min(5, steps // 2) :]
    print(json.dumps({"tok_s": workload.tokens / statistics.median(warm), **result}), flush=True)


if __name__ == "__main__":
    main()
