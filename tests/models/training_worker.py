"""The product's trainer beside a plain transformers (and peft) loop: `training_worker.py DIR` writes DIR/results.json.

For every family and for full and LoRA fine-tuning: the losses of 20 steps of both, on the same rows in the same order.
One process for all, since Megatron's import takes longer than such a run; Megatron-Bridge clears its global state at
the end of a training.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "POSTTRAIN_DEVICE": "cpu"}
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the small tokenizer

STEPS, BATCH, LENGTH = 20, 2, 160
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "gpt_neox_sequential": ["query_key_value", "dense_h_to_4h"],
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
}


def write_data(file: Path) -> None:
    """Write 60 short conversations."""
    with file.open("w") as out:
        for i in range(60):
            said = f"say {i} " + "la " * (i % 5)
            turns = [("user", said), ("assistant", f"number {i}, hello" + " world" * (i % 3))]
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")


def train(model: Path, data: Path, run_dir: Path, words: list[str]):
    """Run the product's trainer; return it, and its metrics by step. An adapter's start is kept in RUN_DIR/start."""
    from posttrain.callbacks import RunCallback
    from posttrain.compose import compose
    from posttrain.launch import free_port, prepare
    from posttrain.worker import build

    os.environ["MASTER_PORT"] = str(free_port())
    cfg = compose([
        "model=hf", f"model.path={model}", "data=messages", f"data.path={data}", "data.validation_fraction=null",
        "template=chatml", f"trainer.seq_length={LENGTH}", f"trainer.global_batch_size={BATCH}",
        f"trainer.max_steps={STEPS}",
        "trainer.samples=0", "trainer.export=false", "checkpoint.save=false", "optimizer.lr=5e-3",
        f"cache_dir={run_dir / 'cache'}", *words,
    ])  # fmt: skip
    run_dir.mkdir(parents=True)
    prepare(cfg, run_dir)
    trainer = build(run_dir)
    plain = RunCallback.on_train_start

    def keep_start(self, context) -> None:
        if trainer.peft:
            trainer.bridge.save_hf_adapter(context.model, run_dir / "start", trainer.peft, show_progress=False)
        plain(self, context)

    RunCallback.on_train_start = keep_start
    try:
        trainer.fit()
    finally:
        RunCallback.on_train_start = plain
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return trainer, [line for line in lines if "loss" in line]


def plain_loop(model, trainer, rates: list[float]) -> list[float]:
    """Losses of a plain loop over the trainer's rows, each conversation by itself."""
    import torch

    from posttrain.batches import TrainOrder

    rows = TrainOrder(trainer.splits.train, STEPS * BATCH, trainer.config.seed, None)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    losses = []
    model.train()
    for step, rate in enumerate(rates):
        total, trained = 0.0, 0
        for row in (rows[step * BATCH + i] for i in range(BATCH)):
            keys = ("input_ids", "labels", "loss_mask")
            tensors = [torch.as_tensor(row[key]).long().split(row["seq_lens"].tolist()) for key in keys]
            for tokens, labels, mask in zip(*tensors, strict=True):
                logits = model(tokens[None]).logits[0]
                total = total + (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * mask).sum()
                trained += int(mask.sum())
        loss = total / trained
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    directory = Path(sys.argv[1])
    from posttrain import patches

    patches.apply(patches.Platform(device="cpu", transformer_engine=False))
    import torch
    from families import FAMILIES, save_random
    from peft import PeftModel
    from tiny_tokenizer import byte_tokenizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    data = directory / "data.jsonl"
    write_data(data)
    results = {}
    for family in sys.argv[2:] or FAMILIES:
        source = directory / family
        positions = {"n_positions": LENGTH} if family == "gpt2" else {}
        save_random(family, source, vocab_size=288, **positions)
        byte_tokenizer().save_pretrained(source)
        for method in ("full", "lora"):
            targets = TARGETS.get(family, [*ATTENTION, "gate_proj", "up_proj", "down_proj"])
            words = ["peft=none"] if method == "full" else ["peft=lora", f"peft.target_modules=[{','.join(targets)}]"]
            run_dir = directory / "runs" / f"{family}-{method}"
            trainer, metrics = train(source, data, run_dir, words)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
            if method == "lora":
                model = PeftModel.from_pretrained(model, run_dir / "start", is_trainable=True, torch_device="cpu")
            ours = [line["loss"] for line in metrics]
            results[f"{family}-{method}"] = [ours, plain_loop(model, trainer, [line["lr"] for line in metrics])]
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
