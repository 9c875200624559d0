"""The product's trainer beside a plain transformers (and peft) loop: `training_worker.py DIR CASES`, DIR/results.json.

A case is family-method. For each: the losses of 20 steps of both, on the same rows in the same order; in bf16 those of
the plain loop in fp32 as well, and what the trainer's export found (verification.json). One process for all, since
Megatron's import takes longer than such a run; Megatron-Bridge clears its global state at the end of a training.
"""

import argparse
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
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
METHODS = {
    # Continued pre-training: attention within documents, or over all of them as one stream.
    "text": ["peft=none", "objective.overlap=1"],
    "stream": ["peft=none", "objective.document_boundaries=false"],
    "full": ["peft=none"],
    "window": ["peft=none", "trainer.log_interval=3"],
    # Five rows in steps of four, twice: the last micro-batches of an epoch are padding in part and in whole.
    "epochs": [
        "peft=none",
        "trainer.max_steps=null",
        "trainer.epochs=2",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "data.max_train_rows=14",
    ],
    "gentle": ["peft=none", "optimizer.lr=2e-6", "optimizer.adam_eps=1e-6"],
    "lora": ["peft=lora"],
    "canonical": ["peft=lora", "peft.target_modules=[q_proj,v_proj]"],
    # Megatron's adapters on joined matrices share their A; these two matrices are nobody's part, as in PEFT.
    "dora": ["peft=dora", "peft.target_modules=[linear_proj,linear_fc2]"],
    "joined": ["peft=lora", "peft.target_modules=all-linear"],
}


def write_data(file: Path) -> None:
    """Write 60 short conversations, and as many texts beside them."""
    with file.open("w") as out, file.with_suffix(".txt").open("w") as texts:
        for i in range(60):
            said = f"say {i} " + "la " * (i % 5)
            answer = f"number {i}, hello" + " world" * (i % 3)
            turns = [("user", said), ("assistant", answer)]
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
            texts.write(f"{said}: {answer}, " * (1 + i % 4) + "\n")


def data_words(file: Path, method: str) -> list[str]:
    """What a method is trained on."""
    if method in ("text", "stream"):
        return ["objective=text", f"data.path={file.with_suffix('.txt')}", "data.format.split=line"]
    return ["data=messages", f"data.path={file}", "template=chatml"]


def train(model: Path, data: list[str], run_dir: Path, words: list[str]):
    """Run the product's trainer; return its context and the lines of its steps.

    An adapter's start is kept in RUN_DIR/start.
    """
    from posttrain.config.composition import compose
    from posttrain.convert.export import Source, write_adapter
    from posttrain.launch.launcher import prepare
    from posttrain.launch.nodes import reserve_port
    from posttrain.launch.worker import build
    from posttrain.train.callbacks import RunCallback

    port = reserve_port()
    os.environ["MASTER_PORT"] = str(port.getsockname()[1])
    cfg = compose([
        "model=hf", f"model.path={model}", *data, "data.validation_fraction=null",
        f"trainer.seq_length={LENGTH}", f"trainer.global_batch_size={BATCH}",
        f"trainer.max_steps={STEPS}", "trainer.num_generations=0", "optimizer.lr=5e-3",
        f"cache_dir={run_dir / 'cache'}", *words,
    ])  # fmt: skip
    run_dir.mkdir(parents=True)
    prepare(cfg, run_dir)
    trainer = build(run_dir)
    plain = RunCallback.on_train_start
    contexts = []

    def keep_start(self, context) -> None:
        model = self.exporter.model
        contexts.append(self.run)
        if model.peft:
            source = Source(
                trainer.groups.model, model.bridge, context.model, model.peft, None, trainer.platform.device
            )
            write_adapter(source, run_dir / "start")
        plain(self, context)

    RunCallback.on_train_start = keep_start
    try:
        trainer.fit()
    finally:
        RunCallback.on_train_start = plain
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return contexts[0], [line for line in lines if "loss" in line]


def plain_loop(model, run, rates: list[float]) -> list[float]:
    """Losses of a plain loop over the run's rows, each conversation by itself."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.999), eps=run.groups.optimizer.adam_eps,
        weight_decay=0.0,
    )  # fmt: skip
    losses = []
    model.train()
    for rows, rate in zip(shuffled_batches(run), rates, strict=False):
        parts: list[list[torch.Tensor]] = [[], [], []]
        for row in rows:
            for part, key in zip(parts, ("input_ids", "labels", "loss_mask"), strict=True):
                part += torch.as_tensor(row[key]).long().split(row["seq_lens"].tolist())
        # Padded on the right, where nothing that counts can look.
        tokens, labels, mask = (pad_sequence(part, batch_first=True).to(model.device) for part in parts)
        logits = model(tokens).logits.float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (each * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def shuffled_batches(run) -> Iterator[list[dict]]:
    """The rows of each step: a new permutation for each epoch, whose last batch has what is left."""
    import numpy as np

    rows, batch = run.splits.train, run.settings.global_batch_size
    for epoch in itertools.count():
        shuffled = np.random.default_rng([run.config.seed, epoch]).permutation(len(rows)).tolist()
        for batch_of in itertools.batched(shuffled, batch):
            yield [rows[index] for index in batch_of]


def compare(case: str, directory: Path, bf16: bool, width: int, words: list[str]) -> dict:
    """Train a case in both; its losses and what its export found."""
    import torch
    from families import save_random
    from peft import PeftModel
    from tiny_tokenizer import byte_tokenizer
    from transformers import AutoModelForCausalLM

    from posttrain.models import HFModel

    family, _, method = case.rpartition("-")
    source, run_dir = directory / family, directory / "runs" / case
    if family == "smollm2":
        source = HFModel(path="demo:smollm2_135m").directory
    elif not source.is_dir():
        positions = {"n_positions": LENGTH} if family == "gpt2" else {}
        save_random(family, source, width=width, vocab_size=288, **positions)
        byte_tokenizer().save_pretrained(source)
    words = [*words, *METHODS[method]]
    if method == "lora":
        targets = TARGETS.get(family, [*ATTENTION, "gate_proj", "up_proj", "down_proj"])
        words.append(f"peft.target_modules=[{','.join(targets)}]")
    run, metrics = train(source, data_words(directory / "data.jsonl", method), run_dir, words)
    result = {
        "ours": [line["loss"] for line in metrics],
        "steps": [line["step"] for line in metrics],
        "epochs": [line["epoch"] for line in metrics],
        "step_seconds": [line["step_seconds"] for line in metrics],
        "seconds": run.progress.seconds,
        "rows": len(run.splits.train),
    }
    for name, dtype in (("plain", torch.float32), ("plain_bf16", torch.bfloat16))[: 2 if bf16 else 1]:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")
        model = model.to(run.platform.device)
        if run.groups.peft:
            start = run_dir / "start"
            model = PeftModel.from_pretrained(model, start, is_trainable=True, torch_device=run.platform.device)
        result[name] = plain_loop(model, run, list(map(run.schedule.rate, range(1, run.steps + 1))))
    for file in run_dir.glob("*/verification.json"):
        result["export"] = json.loads(file.read_text())["logits"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--words", nargs="*", default=["trainer.export=false", "checkpoint.save=false"])
    arguments = parser.parse_args()
    os.environ["POSTTRAIN_DEVICE"] = arguments.device
    global BATCH, LENGTH
    BATCH, LENGTH = arguments.batch, arguments.length
    import torch

    from posttrain import patches

    patches.apply(patches.Platform.detect(arguments.device))
    torch.set_num_threads(1)
    write_data(arguments.directory / "data.jsonl")
    results = {}
    words = [*arguments.words, f"precision={'bf16' if arguments.bf16 else 'fp32'}"]
    for case in arguments.cases:
        print(case, flush=True)
        try:
            results[case] = compare(case, arguments.directory, arguments.bf16, arguments.width, words)
        except Exception:
            results[case] = {"error": traceback.format_exc()[-3000:]}
            clear()
    (arguments.directory / "results.json").write_text(json.dumps(results))


def clear() -> None:
    """Leave Megatron as a training that ended well leaves it, for the next case."""
    import torch
    from megatron.bridge.training.initialize import destroy_global_state

    destroy_global_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
