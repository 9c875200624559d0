"""Expected time: operations over what a GPU achieves, as measured with this project (bench/README.md)."""

from dataclasses import dataclass

from posttrain import flops
from posttrain.plan.gpus import Gpu
from posttrain.plan.setting import Setting

# Width of the residual stream -> share of the peak rate that was reached on an H200, step captured in a CUDA graph.
MFU = {2048: 0.46, 4096: 0.53}
# How much more with `precision=fp8` and LoRA, measured at 4096 wide; over the bf16 rate as well.
EIGHT_BIT = 1.36
# Without the graph the host can be too slow: seconds of launching kernels per layer and micro-batch, both ways.
LAUNCH_S = 0.0063


@dataclass(frozen=True)
class Speed:
    """Expected time.

    Attributes:
        mfu: useful operations over the peak rate.
        step_s: seconds of a step; None where the GPU's rate is not known.
        tokens_per_second: of all GPUs together.
        bound: what limits it: "arithmetic" or "kernel launches".
    """

    mfu: float | None
    step_s: float | None
    tokens_per_second: float | None
    bound: str


def speed(s: Setting, gpu: Gpu, tokens: float) -> Speed:
    """Time of a step with `tokens` tokens of text; communication between GPUs is not counted."""
    if gpu.tflops is None:
        return Speed(None, None, None, "unknown")
    shape = s.shape
    peak = gpu.tflops * 1e12 * s.world * (1 if s.precision != "fp32" else 0.5)
    model = flops.Model(shape.products, s.adapters is not None, shape.layers * shape.query, peak)
    squared = tokens * (s.squares or s.length)
    useful = model.step(tokens, squared)
    work = useful
    if s.recompute == "full":  # each layer's forward pass again
        work += 2 * (shape.products - shape.hidden * shape.vocab) * tokens + 2 * model.attention * squared
    arithmetic = work / peak / reached(shape.hidden) / (EIGHT_BIT if s.eight_bit_base else 1.0)
    launches = 0.0 if s.captured else s.micro_batches * shape.layers / s.pipeline * LAUNCH_S
    busy = max(arithmetic, launches)
    seconds = busy * (s.micro_batches + s.pipeline - 1) / s.micro_batches  # the pipeline fills and empties
    bound = "arithmetic" if arithmetic >= launches else "kernel launches"
    return Speed(useful / peak / seconds, seconds, tokens / seconds, bound)


def reached(hidden: int) -> float:
    """The measured share of the peak, between the measured widths in proportion."""
    (small, low), (large, high) = sorted(MFU.items())
    place = min(max((hidden - small) / (large - small), 0.0), 1.0)
    return low + place * (high - low)
