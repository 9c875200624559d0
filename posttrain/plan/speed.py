"""Expected time: operations over the rate that a GPU achieves, as measured (bench/README.md)."""

from dataclasses import dataclass

from posttrain.plan.flops import ModelFlops
from posttrain.spec.run_spec import RunSpec
from posttrain.utils.gpus import Gpu

# Width of the residual stream -> share of the peak rate, on an H200 with a CUDA graph.
MFU = {2048: 0.46, 4096: 0.53}
# The gain of `precision=fp8` with LoRA, measured at 4096 wide; over the bf16 rate as well.
EIGHT_BIT = 1.36
# Without the graph the host can be too slow: seconds of launching kernels per layer and
# micro-batch, forward and backward.
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


def estimate_speed(s: RunSpec, gpu: Gpu, tokens: float) -> Speed:
    """Estimate the time of a step with `tokens` tokens; communication is not counted."""
    if gpu.tflops is None:
        return Speed(None, None, None, "unknown")
    shape = s.known_shape
    peak = gpu.tflops * 1e12 * s.world
    if s.precision == "fp32":
        peak *= 0.5
    model = ModelFlops.from_shape(shape, frozen=s.adapters is not None, peak=peak)
    squared = tokens * (s.squares or s.length)
    useful = model.step(tokens, squared)
    work = useful
    if s.recompute == "full":  # each layer's forward pass again
        layer_weights = shape.products - shape.hidden * shape.vocab
        work += 2 * layer_weights * tokens + 2 * model.attention * squared
    arithmetic = work / peak / interpolate_mfu(shape.hidden)
    if s.eight_bit_base:
        arithmetic /= EIGHT_BIT
    launches = 0.0
    if not s.cuda_graph:
        launches = s.micro_batches * shape.layers / s.pipeline * LAUNCH_S
    bound = "arithmetic" if arithmetic >= launches else "kernel launches"
    # The pipeline fills and empties.
    bubble = (s.micro_batches + s.pipeline - 1) / s.micro_batches
    seconds = max(arithmetic, launches) * bubble
    return Speed(useful / peak / seconds, seconds, tokens / seconds, bound)


def interpolate_mfu(hidden: int) -> float:
    """Return the measured share of the peak, between the measured widths in proportion."""
    (small, low), (large, high) = sorted(MFU.items())
    fraction = min(max((hidden - small) / (large - small), 0.0), 1.0)
    return low + fraction * (high - low)
