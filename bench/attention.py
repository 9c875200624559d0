"""Soft-capped attention (posttrain/ops/capped_attention.py) on one GPU: how fast it is, and how far from fp32.

    python bench/attention.py [--heads 16 --groups 8 --head 256 --length 4096] [--tune] [--out results.json]

Rows are a whole sequence, one with a window of 1,024, and seven packed ones. Times are medians of CUDA events; TFLOP/s
count visible pairs alone, 4 operations per pair and feature forward and 10 backward (FlashAttention-2's count).
PyTorch's FlexAttention, with its own options, is timed on the same rows. With `--tune` candidates of each kernel's
tiles are timed on the whole sequence, beside the fastest so far of the others; they go into WIDE_HEADS or NARROW_HEADS.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from posttrain import patches
from posttrain.ops.capped_attention import Visible, attend

SOFTCAP = 50.0
KERNELS = {  # what is tuned together
    "forward": ("forward",),
    "queries": ("queries",),
    "keys": ("keys",),
    "values": ("values",),
    "keys and values at once": ("keys", "values"),
}
# (own, other, warps, stages)
CANDIDATES = [
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 1),
    (128, 32, 8, 3),
    (128, 32, 8, 2),
    (64, 64, 8, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 1),
    (64, 32, 4, 2),
    (64, 32, 4, 1),
]

type States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def milliseconds(work: Callable[[], object], repeats: int = 30) -> float:
    """Median time on the GPU, after three runs that don't count."""
    times = []
    for turn in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def written_out(states: States, first: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition, every score held: [t, heads, d]."""
    query, key, value = (tensor.transpose(0, 1) for tensor in states)
    groups = query.size(0) // key.size(0)
    scores = query @ key.repeat_interleave(groups, 0).transpose(-1, -2) * scale
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    token = torch.arange(query.size(1), device=query.device)
    hidden = (token < first[:, None]) | (token > token[:, None])
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value.repeat_interleave(groups, 0)).transpose(0, 1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square of the difference, over that of what is expected."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


def random_states(sizes: argparse.Namespace, total: int) -> tuple[States, torch.Tensor]:
    """Query, key and value [t, heads, d] in bf16, and a gradient of the output."""
    torch.manual_seed(0)
    options: Any = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query = torch.randn(total, sizes.heads, sizes.head, **options)
    key, value = (torch.randn(total, sizes.groups, sizes.head, **options) for _ in range(2))
    return (query, key, value), torch.randn_like(query)


def both_ways(forward: Callable[[], torch.Tensor], states: States, upstream: torch.Tensor) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    out = forward()
    backward = milliseconds(lambda: torch.autograd.grad(out, states, upstream, retain_graph=True))
    return milliseconds(forward), backward


def by_torch(states: States, upstream: torch.Tensor, first: torch.Tensor, scale: float) -> tuple[float, float]:
    """The same of FlexAttention."""

    def cap(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    def is_visible(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return (column >= first[row]) & (column <= row)

    total = len(first)
    mask = create_block_mask(is_visible, None, None, total, total)
    compiled = torch.compile(flex_attention)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in states)
    grouped = states[0].size(1) != states[1].size(1)

    def forward() -> torch.Tensor:
        out: torch.Tensor = compiled(query, key, value, cap, mask, scale, enable_gqa=grouped)[0].transpose(0, 1)
        return out

    return both_ways(forward, states, upstream)


def measure(row: str, ends: list[int], window: int | None, sizes: argparse.Namespace) -> dict[str, float]:
    """Errors and times of one row."""
    from posttrain.ops import attention

    total = ends[-1]
    scale = sizes.head**-0.5
    boundaries = torch.tensor(ends, dtype=torch.int32, device="cuda")
    visible = Visible.from_first(attention.first_visible(boundaries, total, window))
    states, upstream = random_states(sizes, total)

    def forward() -> torch.Tensor:
        return attend(*states, visible, SOFTCAP, scale)

    began = time.perf_counter()
    out = forward()
    gradients = torch.autograd.grad(out, states, upstream, retain_graph=True)
    torch.cuda.synchronize()
    result = {"compile_s": time.perf_counter() - began}
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in states)
    exact = (query, key, value)
    expected = written_out(exact, visible.first, scale)
    right = torch.autograd.grad(expected, exact, upstream.float())
    result["error"] = relative(out, expected.detach())
    for name, found, correct in zip(("query", "key", "value"), gradients, right, strict=True):
        result[f"error_{name}"] = relative(found, correct)
    del expected, right, exact
    pairs = int((torch.arange(total, device="cuda") - visible.first + 1).sum())
    operations = pairs * sizes.heads * sizes.head
    result["ranges_ms"] = milliseconds(lambda: Visible.from_first(attention.first_visible(boundaries, total, window)))
    result["forward_ms"], result["backward_ms"] = both_ways(forward, states, upstream)
    result["forward_tflops"] = 4 * operations / result["forward_ms"] / 1e9
    result["backward_tflops"] = 10 * operations / result["backward_ms"] / 1e9
    flex = by_torch(states, upstream, visible.first, scale)
    result["flex_forward_ms"], result["flex_backward_ms"] = flex
    print(f"{row}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()), flush=True)
    return result


def tune(sizes: argparse.Namespace) -> dict[str, Any]:
    """Time every candidate of each kernel on a whole sequence; the fastest."""
    from posttrain.ops import capped_kernels

    states, upstream = random_states(sizes, sizes.length)
    scale = sizes.head**-0.5
    visible = Visible.from_first(torch.zeros(sizes.length, dtype=torch.int32, device="cuda"))
    best = capped_kernels.choose(states[0])
    capped_kernels.choose = lambda states: best
    for kernel, names in KERNELS.items():
        times = {best: sum(both_ways(lambda: attend(*states, visible, SOFTCAP, scale), states, upstream))}
        former = best
        for candidate in CANDIDATES:
            best = replace(former, **dict.fromkeys(names, capped_kernels.Tiles(*candidate)))
            try:
                times[best] = sum(both_ways(lambda: attend(*states, visible, SOFTCAP, scale), states, upstream))
            except Exception as error:  # more shared memory than there is
                print(f"{kernel} {candidate}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
            print(f"{kernel} {candidate}: forward and backward {times[best]:.3f} ms", flush=True)
        best = min(times, key=lambda choice: times[choice])
    print(f"fastest: {best}", flush=True)
    return asdict(best)


def main() -> None:
    """Measure, print, write the JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--heads", type=int, default=16)
    options.add_argument("--groups", type=int, default=8)
    options.add_argument("--head", type=int, default=256)
    options.add_argument("--length", type=int, default=4096)
    options.add_argument("--tune", action="store_true")
    options.add_argument("--out", type=Path)
    sizes = options.parse_args()
    patches.apply(patches.Platform.detect("cuda"))
    functorch_config.donated_buffer = False  # backward passes of FlexAttention are repeated
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    results: dict[str, object] = {}
    if sizes.tune:
        results["fastest"] = tune(sizes)
    whole = [0, sizes.length]
    eighth = sizes.length // 8
    packed = [0, eighth - 5, eighth, 2 * eighth + 17, 4 * eighth, 6 * eighth - 100, 7 * eighth, sizes.length]
    for row, ends, window in (
        ("whole", whole, None),
        ("window of 1,024", whole, 1023),
        ("packed", packed, None),
    ):
        results[row] = measure(row, ends, window, sizes)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, the fp32 comparison included")
    if sizes.out:
        sizes.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
