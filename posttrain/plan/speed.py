"""Expected time: operations over the rate that a GPU achieves, as measured (bench/README.md)."""

from dataclasses import dataclass

from posttrain.plan.flops import ModelFlops
from posttrain.spec.run_spec import RunSpec
from posttrain.utils.gpus import Gpu

# Width of the residual stream -> share of the peak rate, on an H200 with a CUDA graph.
MFU = {2048: 0.46, 4096: 0.53}
# The same, of how much faster `precision=fp8` is with LoRA.
EIGHT_BIT = {4096: 1.36, 8192: 1.83}
# Share of the peak rate of a mixture's experts as grouped products, sending tokens to them and back included. Computed
# from the bytes and operations of each kernel, not measured.
EXPERTS = 0.3
# Without the graph the host can be too slow: seconds of launching kernels per layer and
# micro-batch, forward and backward.
LAUNCH_S = 0.0063
# The same of a mixture whose host waits for counts in each layer: Qwen3-30B-A3B, an H200.
WAITING_S = 0.0275
# Bytes a second that NCCL moves between GPUs of one machine over NVLink, tens of megabytes at a time: the size of the
# gathered tensor over the time, measured on 4 H200s.
LINK = 285e9
# Times that a transformer layer's residual stream is gathered or summed over tensor parallelism: before and after
# attention and MLP, forward and backward. Nothing is computed meanwhile.
EXCHANGES = 8


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
    """Estimate the time of a step with `tokens` tokens.

    Counted of the communication is what the GPUs wait for: tensor and context parallelism's, over NVLink. Gradients
    are small (adapters) or summed beside the backward pass.
    """
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
    grouped = 0.0
    if s.grouped_experts:
        grouped = work_of_experts(s, tokens)
    arithmetic = (work - grouped) / peak / interpolate(MFU, shape.hidden)
    if s.eight_bit_base:
        arithmetic /= interpolate(EIGHT_BIT, shape.hidden)
    arithmetic += grouped / peak / EXPERTS
    launches = 0.0
    if not s.cuda_graph:
        waits = s.experts > 0 and not s.grouped_experts
        layer = WAITING_S if waits else LAUNCH_S
        launches = s.micro_batches * shape.layers / s.pipeline * layer
    bound = "arithmetic" if arithmetic >= launches else "kernel launches"
    seconds = (max(arithmetic * imbalance(s), launches) + exchange_seconds(s)) * bubble(s)
    return Speed(useful / peak / seconds, seconds, tokens / seconds, bound)


def work_of_experts(s: RunSpec, tokens: float) -> float:
    """Operations of a step in the products of frozen experts."""
    shape = s.known_shape
    weights = 0
    for linear in shape.linears:
        if linear.experts:
            weights += shape.layers * shape.chosen * linear.inputs * linear.outputs
    passes = 3 if s.recompute == "full" else 2  # forward, again, and of the input's gradient
    return 2.0 * passes * weights * tokens


def bubble(s: RunSpec) -> float:
    """How much longer a step takes because the pipeline fills and empties."""
    return (s.micro_batches + s.pipeline - 1) / s.micro_batches


def imbalance(s: RunSpec) -> float:
    """How much more the last stage of a pipeline computes than the mean: layers are divided evenly, it has the head."""
    shape = s.known_shape
    head = shape.hidden * shape.vocab / shape.products
    return 1 + (s.pipeline - 1) * head


def exchange_seconds(s: RunSpec) -> float:
    """Seconds of a step that a GPU waits for tensor and context parallelism's exchanges."""
    shape = s.known_shape
    layers = shape.layers / s.pipeline
    token = 0.0  # bytes of a token in a layer
    if s.tensor > 1:
        passes = EXCHANGES * 1.5 if s.recompute == "full" else EXCHANGES
        token += passes * shape.hidden * s.width
    if s.context > 1:  # queries, keys, values and outputs, forward and backward
        token += 2 * (2 * shape.query + 2 * shape.key) * s.width / s.tensor
    return s.micro_batches * layers * s.tokens * token / LINK


def interpolate(measured: dict[int, float], hidden: int) -> float:
    """Return what was measured at a width; between the two in proportion, beyond them as at the nearer one."""
    (small, low), (large, high) = sorted(measured.items())
    fraction = min(max((hidden - small) / (large - small), 0.0), 1.0)
    return low + fraction * (high - low)
