"""Expected time: operations over the rate that a GPU achieves, as measured (bench/README.md)."""

from dataclasses import dataclass, replace
from itertools import pairwise

from posttrain.plan.activations import saved_activations
from posttrain.plan.flops import ModelFlops
from posttrain.plan.memory import bytes_of_weights, offloaded, parameters
from posttrain.spec.run_spec import RunSpec
from posttrain.utils.gpus import Gpu

# Shares of a GPU's peak rate, and of its memory's bandwidth, that a captured step reaches: LoRA in bf16, an H200.
# Of products by width of the residual stream: GPT-2 XL's 1,600 fill no whole tiles.
PRODUCTS = {1600: 0.53, 2048: 0.66}
# Of attention by features of a head, forward and backward together, whole rows of 4,096.
ATTENTION = {64: 0.29, 128: 0.326, 256: 0.295}
# How much more or less of that rows of other lengths reach.
LENGTHS = {1024: 0.5, 4096: 1.0, 32768: 1.4}
# The share of soft-capped attention (posttrain.ops.capped_attention), heads of 256.
CAPPED_ATTENTION = 0.21
PASSES = 0.54
# Width of the residual stream -> how much faster products are with frozen weights in 8 bits.
EIGHT_BIT = {4096: 1.52, 8192: 1.82}
# Width of an expert -> share of the peak rate of a mixture's experts as grouped products, with all that is done to
# their rows; in bf16 and with weights in 8 bits. In bf16 the wider one was not measured.
EXPERTS = {768: 0.35, 14336: 0.55}
EIGHT_BIT_EXPERTS = {768: 0.33, 14336: 0.66}
# Seconds of a layer and micro-batch that even a captured step takes: Pythia-160M.
CAPTURED_S = 0.0009
# Without the graph the host can be too slow: seconds of launching kernels per layer and
# micro-batch, forward and backward.
LAUNCH_S = 0.0063
# The same of a mixture whose host waits for counts in each layer: Qwen3-30B-A3B, an H200.
WAITING_S = 0.0275
# GB/s between the GPUs on which the following rates were measured, both ways together, by the data sheet. Others are
# taken to be faster or slower in proportion.
MEASURED_LINK = 900.0
# Bytes a second that NCCL moves between GPUs of one machine over NVLink, tens of megabytes at a time: the size of the
# gathered tensor over the time, measured on 4 H200s.
LINK = 285e9
# The same beside products, over the time that it adds to them; and, whatever the size, seconds a layer and micro-batch
# for each of the chunks that products are in, and for as many more: Llama 3 8B, 4,096 and 8,192 tokens, 2 and 4 H200s.
OVERLAPPED_LINK = 900e9
CHUNK_S = 0.000115
OTHER_CHUNKS = 1.5
# What of the gathers and sums of Megatron-FSDP, at NCCL's rate, a step waits for: Llama 3 8B, all weights, two H200s.
FULLY_SHARDED_WAIT = 0.34
# Bytes a second of expert parallelism's gathers and sums, with its small sums of adapters and the wait for the process
# that more tokens have chosen: Qwen3-30B-A3B, two H200s.
EXPERT_LINK = 142e9
# Times that a transformer layer's residual stream is gathered or summed over tensor parallelism: before and after
# attention and MLP, forward and backward.
EXCHANGES = 8
# Times that expert parallelism gathers or sums the residual stream of a layer of grouped experts, or Megatron sends
# each token's choices to and fro: forward and backward.
EXPERT_EXCHANGES = 4


@dataclass(frozen=True)
class Speed:
    """Expected time.

    Attributes:
        mfu: useful operations over the peak rate.
        step_s: seconds of a step; None where the GPU's rate is not known.
        tokens_per_second: of all GPUs together.
        bound: what limits it: "arithmetic" or "kernel launches", or "unknown" as the rate is.
    """

    mfu: float | None
    step_s: float | None
    tokens_per_second: float | None
    bound: str


def estimate_speed(s: RunSpec, gpu: Gpu, tokens: float) -> Speed:
    """Estimate the time of a step with `tokens` tokens.

    Counted of the communication is what the GPUs of a machine wait for: tensor, context and expert parallelism's and
    Megatron-FSDP's, and sums of all weights' gradients. Experts are taken to get equally many tokens.
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
    attention = useful - model.step(tokens, 0)
    products = useful - attention
    products += s.share_again * 2 * (shape.products - shape.hidden * shape.vocab) * tokens
    attention *= 1 + s.share_again / 3
    grouped = work_of_experts(s, tokens)
    rates = Rates.of(s)
    work = (products - grouped) / rates.products + attention / rates.attention + grouped / rates.experts
    arithmetic = work / peak
    if gpu.bandwidth is not None:
        arithmetic += bytes_passed(s, tokens) / (gpu.bandwidth * 1e12 * s.world * PASSES)
    launches = launch_seconds(s)
    bound = "kernel launches"
    if arithmetic >= launches:
        bound = "arithmetic"
    arithmetic += offload_seconds(s, gpu, arithmetic)
    seconds = (max(arithmetic * imbalance(s), launches) + exchange_seconds(s, gpu)) * bubble(s)
    seconds += sum_seconds(s, gpu, seconds)
    return Speed(useful / peak / seconds, seconds, tokens / seconds, bound)


def with_rate(gpu: Gpu) -> Gpu:
    """The GPU, or where its rate is not known one that any rate is taken for: good for ratios of times alone."""
    return gpu if gpu.tflops else replace(gpu, tflops=989.0)


@dataclass(frozen=True)
class Rates:
    """Shares of a GPU's peak rate that a run's products, attention and grouped experts reach."""

    products: float
    attention: float
    experts: float

    @classmethod
    def of(cls, s: RunSpec) -> "Rates":
        """Those of the kernels that the run uses."""
        shape = s.known_shape
        products = interpolate(PRODUCTS, shape.hidden)
        attention = interpolate(ATTENTION, shape.head_width) * interpolate(LENGTHS, s.squares or s.length)
        experts = interpolate(EXPERTS, shape.ffn)
        if shape.score_softcap is not None:
            attention = CAPPED_ATTENTION
        if s.eight_bit_base:
            products *= interpolate(EIGHT_BIT, shape.hidden)
            experts = interpolate(EIGHT_BIT_EXPERTS, shape.ffn)
        return cls(products, attention, experts)


def launch_seconds(s: RunSpec) -> float:
    """The least that a step takes, whatever its size."""
    layer = CAPTURED_S
    if not s.cuda_graph:
        layer = LAUNCH_S
        if s.experts > 0 and not s.grouped_experts:
            layer = WAITING_S
    return s.micro_batches * max(s.stage_layers) * layer


def bytes_passed(s: RunSpec, tokens: float) -> float:
    """Bytes that a step reads and writes between its products: norms, sums, rotations, gates, the loss, the optimizer.

    Passes of each operation forward and backward, what is computed again included, counted as the code has them.
    """
    shape = s.known_shape
    stream, gate = 28, 5
    if shape.family.norms == 4:
        stream = 44
    if shape.family.gate:
        gate = 9
    layer = stream * shape.hidden + 4 * (shape.query + 2 * shape.key)
    if not s.grouped_experts:  # whose rate has it
        layer += gate * shape.ffn * (shape.chosen or 1)
    passed = tokens * s.width * (shape.layers * layer + 4 * shape.vocab)
    if s.adapters is None:
        passed += shape.parameters * bytes_of_update(s)
    return passed


def bytes_of_update(s: RunSpec) -> float:
    """Bytes that the processes read and write for a weight after the last backward pass, all of it trained.

    Gradients, in fp32, are set to zero and divided by the number of tokens; then there are their norm, clipping, and
    the optimizer, which reads them and the moments and writes these, fp32 weights and bf16 ones.
    """
    replicas = s.data_parallel * s.context
    update = 4 + 8 + 30
    if s.bf16_state:
        update -= 10
    if s.fsdp:
        return 12 + update
    if s.divides_state:
        return 12 * replicas + update
    return (12 + update) * replicas


def work_of_experts(s: RunSpec, tokens: float) -> float:
    """Operations of a step in the grouped products of frozen experts; 0 where there are none."""
    if not s.grouped_experts:
        return 0.0
    shape = s.known_shape
    weights = 0
    for linear in shape.linears:
        if linear.experts:
            weights += shape.layers * shape.chosen * linear.inputs * linear.outputs
    passes = 2 + s.share_again  # forward, and of the input's gradient; forward again
    return 2.0 * passes * weights * tokens


def bubble(s: RunSpec) -> float:
    """How much longer a step takes because the pipeline fills and empties."""
    return (s.micro_batches + s.pipeline - 1) / s.micro_batches


def imbalance(s: RunSpec) -> float:
    """How much more than the mean the longest stage of a pipeline computes; the last one has the output layer."""
    shape = s.known_shape
    output_layer = shape.hidden * shape.vocab
    layer = (shape.products - output_layer) / shape.layers
    stages = [layers * layer for layers in s.stage_layers]
    stages[-1] += output_layer
    return max(stages) * s.pipeline / shape.products


def exchange_seconds(s: RunSpec, gpu: Gpu) -> float:
    """Seconds of a step that a GPU waits for tensor, context and expert parallelism's exchanges, or Megatron-FSDP's.

    Exchanges beside products are copies between GPUs that NVLink connects.
    """
    shape = s.known_shape
    layers = max(s.stage_layers)
    layer = 0.0  # seconds of a layer, whatever its tokens
    token = 0.0  # and for each of them
    if s.tensor > 1:
        more = 1 + s.share_again / 2
        rate = LINK
        if s.overlapped_exchanges and gpu.nvlink:
            rate = OVERLAPPED_LINK
            layer = more * CHUNK_S * (s.tensor + OTHER_CHUNKS)
        token += more * EXCHANGES * shape.hidden * s.width / rate
    if s.context > 1:  # queries, keys, values and outputs, forward and backward
        token += 2 * (2 * shape.query + 2 * shape.key) * s.width / s.tensor / LINK
    if s.expert > 1:
        sent = shape.chosen or 1  # times that a token is in what a process gets
        if s.grouped_experts:
            sent = s.expert
        passes = EXPERT_EXCHANGES * (1 + s.share_again / 2)
        token += passes * sent * shape.hidden * s.width / s.tensor / EXPERT_LINK
    slower = MEASURED_LINK / (gpu.link or MEASURED_LINK)
    return s.micro_batches * (layers * (layer + slower * s.tokens * token) + slower * fully_sharded_seconds(s))


def fully_sharded_seconds(s: RunSpec) -> float:
    """Seconds of a micro-batch that a GPU waits for Megatron-FSDP: weights forward and backward, sums of gradients."""
    if not s.fsdp:
        return 0.0
    moved = 2 * bytes_of_weights(s, 0) + 4 * parameters(s, 0).all_trained
    return FULLY_SHARDED_WAIT * moved / LINK


def sum_seconds(s: RunSpec, gpu: Gpu, seconds: float) -> float:
    """Seconds of a step that data-parallel processes wait for the sums of all weights' gradients; adapters' are small.

    Where they divide the optimizer's state each sums its part beside the last backward pass, and gets the others'
    weights beside the first forward pass.

    Args:
        s: the run.
        gpu: what it runs on.
        seconds: of the step without them.
    """
    if s.adapters is not None or s.fsdp or s.data_parallel * s.context == 1:
        return 0.0
    passed, beside = 4 + 4, 0.0
    if s.divides_state:
        passed = 4 + s.width
        if s.overlap:
            beside = seconds / s.micro_batches
    link = LINK * (gpu.link or MEASURED_LINK) / MEASURED_LINK
    return max(0.0, passed * parameters(s, 0).all_trained / link - beside)


def offload_seconds(s: RunSpec, gpu: Gpu, arithmetic: float) -> float:
    """Seconds of a step that copies of activations to the host and back take longer than what they run beside.

    Args:
        s: the run.
        gpu: what it runs on.
        arithmetic: seconds of a step without them.
    """
    _, copied = offloaded(s, saved_activations(s))
    if not copied:
        return 0.0
    passes = (2 if s.adapters is not None else 3) + s.share_again  # of which one is forward
    copy = s.micro_batches * s.tokens * copied / gpu.host_link(s.world // s.machines)
    beside = 1.0
    if s.share_again < 1:  # hardly anything is copied beside the first layers, which are computed again
        beside -= s.share_again
    forward = arithmetic / passes
    backward = arithmetic - forward
    return max(0.0, copy - beside * forward) + max(0.0, copy - beside * backward)


def interpolate(measured: dict[int, float], width: float) -> float:
    """Return what was measured at a width; between two in proportion, beyond them as at the nearest one."""
    points = sorted(measured.items())
    for (small, low), (large, high) in pairwise(points):
        if width <= large:
            fraction = max((width - small) / (large - small), 0.0)
            return low + fraction * (high - low)
    return points[-1][1]
