"""What frozen weights in 8 bits cost in loss, on rows that are held out: LoRA on a real model, bf16 beside it.

    python bench/eight_bit_loss.py MODEL_DIR ROWS.jsonl [--prompt question] [--completion answer] [--steps 60]

Transformers and PEFT train; every frozen linear layer but the output layer is posttrain.ops.fp8_linear's, so products
and gradients are rounded as in `precision=fp8`. On a GPU these are its kernels, on a CPU the same numbers in E4M3,
multiplied in bf16. A seed decides the adapter, the rows of a step and those that are held out, for both formats alike.
A loss is the mean over the answers' tokens.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.ops.fp8_linear import Weight, quantise

FORMATS = ("bf16", "fp8")
LONGEST = 384  # tokens of a row

type Row = tuple[list[int], int]  # tokens, and how many of them are the prompt's


class EightBitProduct(torch.autograd.Function):
    """x W^T of a frozen W in 8 bits, as posttrain.ops.fused_lora computes it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        ctx.weight = weight
        flat = x.reshape(-1, x.size(-1))
        return weight.product(flat).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of x."""
        flat = upstream.reshape(-1, upstream.size(-1))
        gradient = ctx.weight.gradient_product()(flat, None)
        return gradient.view(*upstream.shape[:-1], -1), None


class EightBitLinear(torch.nn.Linear):
    """A frozen linear layer without a bias."""

    eight_bit: Weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        result: torch.Tensor = EightBitProduct.apply(x, self.eight_bit)
        return result


def read_rows(path: Path, tokenizer: Any, prompt: str, completion: str) -> list[Row]:
    """The rows of a JSONL file that are no longer than LONGEST tokens."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first = tokenizer(f"{row[prompt]}\n", add_special_tokens=False)["input_ids"]
        answer = tokenizer(row[completion], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(first) + len(answer) <= LONGEST:
            rows.append((first + answer, len(first)))
    return rows


def losses(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """The losses of all answers' tokens of rows, side by side in one batch."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for place, (tokens, prompt) in enumerate(rows):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        labels[place, prompt : len(tokens)] = ids[place, prompt : len(tokens)]
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device)).logits[:, :-1].float()
    targets = labels[:, 1:].to(device)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return each[targets >= 0]


def batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Parts of rows, in their order."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: list[Row], size: int) -> float:
    """The mean loss over the answers' tokens of all rows."""
    return torch.cat([losses(model, batch) for batch in batches(rows, size)]).mean().item()


def prepare(directory: Path, number_format: str, device: str) -> torch.nn.Module:
    """The model in bf16 with an adapter; with fp8 its linear layers in 8 bits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, module in model.named_modules():
        if number_format == "fp8" and name.endswith(".base_layer"):
            module.__class__ = EightBitLinear
            module.eight_bit = Weight(*quantise(module.weight.detach()))
    return model


def train(given: argparse.Namespace, number_format: str, seed: int, rows: list[Row]) -> list[float]:
    """Train; held-out losses before, and after each third of the steps."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = rng.sample(rows, len(rows))
    held_out, rest = rows[: given.held_out], rows[given.held_out :]
    model = prepare(given.model, number_format, given.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.lr, weight_decay=0.0)
    found = [held_out_loss(model, held_out, given.batch)]
    for step in range(1, given.steps + 1):
        loss = losses(model, rest[(step - 1) * given.batch : step * given.batch]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % (given.steps // 3) == 0:
            found.append(held_out_loss(model, held_out, given.batch))
    return found


def main() -> None:
    """Train with each format and seed; a line each, then what 8 bits cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--prompt", default="question")
    parser.add_argument("--completion", default="answer")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    rows = read_rows(given.rows, AutoTokenizer.from_pretrained(given.model), given.prompt, given.completion)
    print(f"{given.device}, {len(rows):,} rows, {given.held_out} held out, {given.steps} steps of {given.batch}")
    last: dict[str, list[float]] = {name: [] for name in FORMATS}
    for seed in range(given.seeds):
        for name in FORMATS:
            found = train(given, name, seed, rows)
            last[name].append(found[-1])
            print(f"seed {seed}, {name}: held-out loss {', '.join(f'{loss:.4f}' for loss in found)}", flush=True)
    costs = [eight - plain for plain, eight in zip(last["bf16"], last["fp8"], strict=True)]
    print(
        f"8 bits cost {statistics.mean(costs):+.4f} ({min(costs):+.4f} to {max(costs):+.4f}) of the last held-out loss"
    )


if __name__ == "__main__":
    main()
