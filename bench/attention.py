"""Soft-capped attention (posttrain/ops/capped_attention.py) on one GPU: how fast it is, and how far from fp32.

    python bench/attention.py [--heads 16 --groups 8 --head 256 --length 4096] [--tune] [--out results.json]

Rows are a whole sequence, one with a window of 1,024, and seven packed ones. Times are medians of CUDA events; TFLOP/s
count visible pairs alone, 4 operations per pair and feature forward and 10 backward (FlashAttention-2's count). With
`--tune` each candidate of FlexAttention's kernel options is timed on the whole sequence, and the fastest forward and
backward are printed as they go into WIDE_HEADS.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._functorch import config as functorch_config

from posttrain import patches

SOFTCAP = 50.0
# (BLOCK_M, BLOCK_N, num_warps, num_stages); FlexAttention's own for heads of 256 on an H100 is the first.
FORWARD = [(64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)]
# (BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2, num_warps, num_stages); its own, which spills most registers, is the first.
BACKWARD = [
    (64, 64, 64, 64, 4, 2),
    (64, 64, 64, 64, 8, 2),
    (64, 64, 64, 64, 8, 1),
    (64, 128, 128, 64, 8, 2),
    (64, 64, 64, 64, 16, 2),
    (32, 64, 64, 32, 8, 2),
    (32, 64, 64, 32, 8, 3),
    (32, 32, 32, 32, 4, 2),
]


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


def written_out(states: list[torch.Tensor], first: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition, every score held: [1, heads, t, d]."""
    query, key, value = states
    groups = query.size(1) // key.size(1)
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    token = torch.arange(query.size(2), device=query.device)
    hidden = (token < first[:, None]) | (token > token[:, None])
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value.repeat_interleave(groups, 1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square of the difference, over that of what is expected."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


def measure(row: str, ends: list[int], window: int | None, sizes: argparse.Namespace) -> dict[str, float]:
    """Errors and times of one row."""
    from posttrain.ops import attention, capped_attention

    total = ends[-1]
    scale = sizes.head**-0.5
    boundaries = torch.tensor(ends, dtype=torch.int32, device="cuda")
    first = attention.first_visible(boundaries, total, window)
    mask = capped_attention.build_block_mask(first)
    states, upstream = random_states(sizes, total)

    def forward() -> torch.Tensor:
        return capped_attention.attend(*states, mask, SOFTCAP, scale)

    began = time.perf_counter()
    out = forward()
    gradients = torch.autograd.grad(out, states, upstream, retain_graph=True)
    torch.cuda.synchronize()
    result = {"compile_s": time.perf_counter() - began}
    exact = [tensor.detach().float().requires_grad_() for tensor in states]
    expected = written_out(exact, first, scale)
    right = torch.autograd.grad(expected, exact, upstream.float())
    result["error"] = relative(out, expected.detach())
    for name, found, correct in zip(("query", "key", "value"), gradients, right, strict=True):
        result[f"error_{name}"] = relative(found, correct)
    del expected, right, exact
    pairs = int((torch.arange(total, device="cuda") - first + 1).sum())
    operations = pairs * sizes.heads * sizes.head
    result["mask_ms"] = milliseconds(
        lambda: capped_attention.build_block_mask(attention.first_visible(boundaries, total, window))
    )
    result["forward_ms"] = milliseconds(forward)
    result["backward_ms"] = milliseconds(lambda: torch.autograd.grad(out, states, upstream, retain_graph=True))
    result["forward_tflops"] = 4 * operations / result["forward_ms"] / 1e9
    result["backward_tflops"] = 10 * operations / result["backward_ms"] / 1e9
    print(f"{row}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()), flush=True)
    return result


def random_states(sizes: argparse.Namespace, total: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value in bf16, strided as a packed layer's are, and a gradient of the output."""
    torch.manual_seed(0)
    states = []
    for heads in (sizes.heads, sizes.groups, sizes.groups):
        tensor = torch.randn(total, heads, sizes.head, device="cuda", dtype=torch.bfloat16)
        states.append(tensor.transpose(0, 1)[None].requires_grad_())
    return states, torch.randn_like(states[0])


def tune(sizes: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Time every candidate on a whole sequence; the fastest of each direction."""
    from posttrain.ops import attention, capped_attention

    states, upstream = random_states(sizes, sizes.length)
    first = attention.first_visible(
        torch.tensor([0, sizes.length], dtype=torch.int32, device="cuda"), sizes.length, None
    )
    mask = capped_attention.build_block_mask(first)

    def timed(options: dict[str, int], backward: bool) -> float:
        torch.compiler.reset()
        capped_attention.WIDE_HEADS.update(options)

        def forward() -> torch.Tensor:
            return capped_attention.attend(*states, mask, SOFTCAP, sizes.head**-0.5)

        if not backward:
            return milliseconds(forward)
        out = forward()
        return milliseconds(lambda: torch.autograd.grad(out, states, upstream, retain_graph=True))

    fastest = {}
    for direction, names, candidates in (
        ("fwd", ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), FORWARD),
        ("bwd", ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages"), BACKWARD),
    ):
        times = {}
        for candidate in candidates:
            options = {f"{direction}_{name}": value for name, value in zip(names, candidate, strict=True)}
            try:
                times[candidate] = timed(options, direction == "bwd")
            except Exception as error:  # more shared memory than there is
                print(f"{direction} {candidate}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
            print(f"{direction} {candidate}: {times[candidate]:.3f} ms", flush=True)
        best = min(times, key=lambda candidate: times[candidate])
        fastest[direction] = {f"{direction}_{name}": value for name, value in zip(names, best, strict=True)}
        capped_attention.WIDE_HEADS.update(fastest[direction])
        print(f"fastest: {fastest[direction]}", flush=True)
    torch.compiler.reset()
    return fastest


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
    functorch_config.donated_buffer = False  # backward passes are repeated
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
