"""Training throughput on one GPU: this project and Hugging Face + PEFT (+ Liger) side by side, in one run.

    python bench/throughput.py DATA.jsonl TOKENIZER_DIR [--shapes 1b 8b] [--out results.json]

DATA.jsonl has `question` and `answer` (GSM8K's train.jsonl, say). Every side trains a randomly initialised Llama of the
same shape with LoRA rank 16 on all linear layers in bf16, sequences of 4096 tokens. This project trains real packed
conversations, its default path; the peer trains random full-length sequences, which is the best case for it: no padding
and no boundaries. tok/s counts prompt and answer tokens without padding; the median step after the first five.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "1b": ("llama32_1b", 4, {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
    "8b": ("llama3_8b", 2, {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
}
SEQUENCE, RANK, STEPS, WARMUP = 4096, 16, 14, 5


def ours(shape: str, data: str, tokenizer: str, micro: int, *words: str) -> dict:
    """Train with this project; its own metrics."""
    model, batch, _ = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, "-m", "posttrain", f"model={model}", "model.random_init=true",
            f"model.tokenizer={tokenizer}", "data=prompt_completion", f"data.path={data}",
            "data.format.prompt=question", "data.format.completion=answer", "data.validation_fraction=0.01",
            f"trainer.max_steps={STEPS}", f"trainer.global_batch_size={batch}", f"trainer.micro_batch_size={micro}",
            "trainer.samples=0", "trainer.validation_batches=1", "trainer.export=false", "checkpoint.save=false",
            f"hydra.run.dir={run}", *words,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line][WARMUP:]
    return {"tok_s": statistics.median(speeds), "peak_gib": summary["peak_memory_gib"],
            "mfu": statistics.median([line["mfu"] for line in lines if "mfu" in line][WARMUP:]),
            "first_step_s": summary["time_to_first_step_s"]}  # fmt: skip


def peer(shape: str, liger: bool, micro: int) -> dict:
    """One Hugging Face + PEFT loop, in this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    _, batch, sizes = SHAPES[shape]
    config = LlamaConfig(
        **sizes, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=5e5,
        max_position_embeddings=8192, tie_word_embeddings=shape == "1b", use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(batch // micro):
            ids = torch.randint(0, config.vocab_size, (micro, SEQUENCE), device="cuda")
            (model(input_ids=ids, labels=ids).loss * micro / batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[WARMUP:])
    return {"tok_s": batch * SEQUENCE / median, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> None:
    """Measure each row, print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("data")
    options.add_argument("tokenizer")
    options.add_argument("--shapes", nargs="+", default=["1b"], choices=SHAPES)
    options.add_argument("--out", type=Path)
    options.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)  # one peer in a process of its own
    given = options.parse_args()
    if given.peer:
        shape, liger, micro = given.peer
        print(json.dumps(peer(shape, liger == "liger", int(micro))))
        return
    rows = []
    for shape in given.shapes:
        for micro in sorted({1, SHAPES[shape][1]}):
            row = {"shape": shape, "micro_batch_size": micro}
            plain = ("trainer.cuda_graph=false", "peft.fused=false", "trainer.trained_logits_only=false")
            row["posttrain"] = ours(shape, given.data, given.tokenizer, micro)
            row["posttrain, no fast paths"] = ours(shape, given.data, given.tokenizer, micro, *plain)
            for name in ("hf", "liger"):
                command = [sys.executable, __file__, given.data, given.tokenizer, "--peer", shape, name, str(micro)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row["HF + PEFT" + (" + Liger" if name == "liger" else "")] = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            for name, result in row.items():
                if isinstance(result, dict):
                    ratio = row["posttrain"]["tok_s"] / result["tok_s"]
                    print(f"{shape} x{micro}  {name:26} {result['tok_s']:9,.0f} tok/s  {result['peak_gib']:5.1f} GiB"
                          f"  posttrain is {ratio:.2f}x", flush=True)  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
