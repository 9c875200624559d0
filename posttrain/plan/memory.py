"""Memory of one GPU by part: what is always allocated, and the most that a step adds to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.models.offloaded_layers import AWAY, SMALLEST, chosen_layers
from posttrain.plan import activations
from posttrain.spec.run_spec import RunSpec
from posttrain.spec.shape import Adapters, Linear
from posttrain.utils.gpus import Gpu

GIB = 2**30
# In torch's allocator: workspaces of 32 MiB, cuBLAS' and Transformer Engine's.
WORKSPACE = 0.06 * GIB
# A CUDA graph is captured on a stream that has workspaces of its own, and keeps the batches and
# losses of a step. Measured, not itemised.
GRAPH = 0.14 * GIB
# Outside of torch's allocator: the driver and the kernels, and NCCL's buffers.
CONTEXT = 0.55 * GIB
NCCL = 1.0 * GIB
HOST_SHARE = 0.8  # of the host's memory that may be activations
# Memory of a machine that nobody has looked at, over its GPUs': a DGX H100 has 3.1 times, H200 1.8, B200 1.4 or 2.8.
HOST_MEMORY = 1.5
FRAGMENTATION = 0.03  # of the allocator
AHEAD = 500e6  # numbers that Megatron-FSDP gathers before they are needed; of weights in 8 bits a pair is one
OPTIMIZER_STATE = {"adam": 8, "sgd": 4}  # bytes of moments per trained parameter
BF16_STATE = 6  # bytes of Adam's moments and of what bf16 weights lack of fp32 ones; Megatron-FSDP has these whole


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage.

    Attributes:
        parts: what torch allocates at the peak, by part.
        outside: what the driver and NCCL take besides.
        host: page-locked memory of the host, for activations.
        detail: what the activations of one layer and the loss consist of: bytes by term.
    """

    parts: dict[str, float]
    outside: float
    detail: dict[str, dict[str, float]]
    host: float = 0.0

    @property
    def peak(self) -> float:
        """What torch reports as the most allocated."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """The memory that the GPU requires."""
        return self.peak * (1 + FRAGMENTATION) + self.outside

    def fits(self, gpu: Gpu) -> bool:
        """Whether the GPU has the memory, and its machine what is kept there."""
        return self.needed <= gpu.memory_gib * GIB and self.fits_host(gpu)

    def fits_host(self, gpu: Gpu) -> bool:
        """Whether the GPU's machine has the memory for its activations, as far as that is known."""
        room = host_room(gpu)
        return room is None or self.host <= room * GIB


def estimate_memory(s: RunSpec) -> Memory:
    """Return the memory of the fullest pipeline stage."""
    indices: Sequence[int] = range(s.pipeline)
    if not s.stage_options:  # the fullest one is the first, the first of the longest ones, or the last
        longest = s.stage_layers.index(max(s.stage_layers))
        indices = sorted({0, longest, s.pipeline - 1})
    return max((stage_memory(s, index) for index in indices), key=lambda memory: memory.needed)


def host_room(gpu: Gpu) -> float | None:
    """GiB of the host's memory that one GPU's activations may take; None: not known."""
    if gpu.host_gib is None:
        return None
    return HOST_SHARE * gpu.host_gib


def stage_memory(s: RunSpec, index: int) -> Memory:
    """Return the memory of a GPU of the pipeline stage `index`, from 0."""
    first = index == 0
    last = index == s.pipeline - 1
    layers = s.stage_layers[index]
    saved = activations.saved_activations(s)
    saved_bytes = sum(saved.values())  # per token and layer
    loss = activations.loss_workspace(s) if last else {}
    loss_bytes = sum(loss.values())
    backward_bytes = s.tokens * activations.backward_workspace(s) + _weight_gradients(s, first and last)
    again = s.layers_again(index)
    if again == layers:  # of the one that is computed again; else what the last layers kept is gone by then
        backward_bytes += s.tokens * saved_bytes
    kept = (layers - again) * saved_bytes + again * saved["layer input"]
    away, host = offloaded(s, saved)
    kept -= away
    in_flight = min(s.pipeline - index, s.micro_batches)
    parts = _state(s, index)
    parts["activations"] = s.tokens * kept * in_flight
    # Either the loss is being computed, or the layer before it goes backward.
    if loss_bytes >= backward_bytes:
        parts["logits and loss"] = loss_bytes
    else:
        parts["backward pass"] = backward_bytes
    parts["workspace"] = WORKSPACE
    whole = _before_division(s, index)
    if s.fsdp and whole > sum(parts.values()):
        parts["the whole model, before it is divided"] = whole - sum(parts.values())
    if s.cuda_graph:
        parts["workspace"] += GRAPH
    outside = CONTEXT
    if s.world > 1:
        outside += NCCL
    layer = {name: s.tokens * size for name, size in saved.items() if size}
    return Memory(parts, outside, {"layer": layer, "loss": loss}, s.tokens * host)


def offloaded(s: RunSpec, saved: dict[str, float]) -> tuple[float, float]:
    """Bytes per token that wait in the host's memory at a time, and that this has room for.

    Args:
        s: the run.
        saved: of a layer, see posttrain.plan.activations.
    """
    if not s.offloaded_layers:
        return 0.0, 0.0
    layers = s.known_shape.layers
    again = s.layers_again(0)
    large = {name: size for name, size in saved.items() if s.tokens * size >= SMALLEST}
    sizes = []
    for number, is_chosen in enumerate(chosen_layers(layers, s.offloaded_layers)):
        if is_chosen and number < again:
            sizes.append(large.get("layer input", 0.0))
        elif is_chosen:
            sizes.append(sum(large.values()))
    return sum(sizes[:-AWAY]), sum(sizes)


def _state(s: RunSpec, index: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer of a GPU of the pipeline stage `index`."""
    counts = parameters(s, index)
    shards = s.data_parallel * s.context
    divided = experts_divided = 1
    if s.divides_state:
        divided = shards
        experts_divided = max(1, shards // s.expert)
    state = OPTIMIZER_STATE[s.optimizer]
    if s.width == 2 or s.fsdp:
        state += 4  # fp32 copies of 16-bit weights; Megatron-FSDP copies others too
    if s.bf16_state:
        state = BF16_STATE + 2 * s.fsdp
    parts = {
        "weights": bytes_of_weights(s, index),
        "gradients": 4.0 * counts.all_trained,  # summed in fp32
        "optimizer": state * (counts.trained / divided + counts.experts_trained / experts_divided),
    }
    if s.fsdp:  # divided as well; some layers are gathered at a time, embedding and output layer once
        shape = s.known_shape
        matrix = shape.vocab * shape.hidden
        ends = matrix if shape.tied else 2 * matrix
        scales = shape.layers * _eight_bits(s)[1]
        gathered = parts["weights"] - scales
        layer = (gathered - s.width * ends) / shape.layers
        at_once = 2
        if s.eight_bit_base:
            at_once = min(shape.layers, 1 + math.ceil(AHEAD / (layer / 2)))
        parts["weights"] = gathered / shards + scales + at_once * layer + s.width * ends
        parts["gradients"] /= shards
        if s.adapters is None:
            parts["gradients"] += 4 * max((counts.all - ends) / shape.layers, matrix)
    return parts


def _before_division(s: RunSpec, index: int) -> float:
    """Bytes of weights on a GPU when Megatron-FSDP divides them: of frozen ones in 8 bits its own part alone."""
    whole = bytes_of_weights(s, index)
    if not s.divided_before_read:
        return whole
    numbers = s.stage_layers[index] * _eight_bits(s)[0]
    return whole - numbers + numbers / (s.data_parallel * s.context)


@dataclass(frozen=True)
class Parameters:
    """Parameters of one GPU.

    Attributes:
        dense, trained: outside of experts, with adapters that a layer's experts share; and which of them are trained.
        experts, experts_trained: of experts.
    """

    dense: float
    trained: float
    experts: float
    experts_trained: float

    @property
    def all(self) -> float:
        """Trained or not."""
        return self.dense + self.experts

    @property
    def all_trained(self) -> float:
        """Of experts or not."""
        return self.trained + self.experts_trained


def parameters(s: RunSpec, index: int) -> Parameters:
    """Count the parameters of one GPU of the pipeline stage `index`."""
    shape = s.known_shape
    layers = s.stage_layers[index]
    dense = experts = 0.0  # of a layer
    for linear in shape.linears:
        if linear.experts:
            experts += _matrix(linear, 1) / s.expert  # tensor parallelism leaves experts whole
        else:
            dense += _matrix(linear, s.tensor)
    weights = layers * (dense + shape.layer_others)
    expert_weights = layers * experts
    embedding = -(-shape.vocab // s.tensor) * shape.hidden
    if index == 0:
        weights += embedding + shape.positions * shape.hidden
    if index == s.pipeline - 1:
        weights += shape.norm
        if not (shape.tied and s.pipeline == 1):
            weights += embedding
    if s.adapters is None:
        return Parameters(weights, weights, expert_weights, expert_weights)
    trained, expert_trained = _adapter_parameters(s, s.adapters, layers / shape.layers)
    return Parameters(weights + trained, trained, expert_weights + expert_trained, expert_trained)


def _adapter_parameters(s: RunSpec, adapters: Adapters, share: float) -> tuple[float, float]:
    """Parameters of one GPU's adapters, outside of experts and of experts, where it has a `share` of the layers."""
    trained = expert_trained = 0.0
    for linear in s.known_shape.linears:
        layers, size = adapters.sizes.get(linear.name, (0, 0))
        count = layers * share * size
        if not linear.experts:
            trained += count / s.tensor
        elif adapters.grouped:  # on each process whole
            trained += count
        else:
            expert_trained += count / s.expert
    return trained, expert_trained


def _matrix(linear: Linear, tensor: int) -> float:
    """Parameters of one process's part of a linear layer; a bias after a divided input is whole."""
    size = linear.inputs * linear.outputs / tensor
    if linear.bias and linear.name in ("linear_proj", "linear_fc2"):
        size += linear.outputs
    elif linear.bias:
        size += linear.outputs / tensor
    return max(linear.experts, 1) * size


def bytes_of_weights(s: RunSpec, index: int) -> float:
    """Bytes of the parameters of the pipeline stage `index` on one GPU, before Megatron-FSDP divides them.

    A frozen 8-bit weight has an fp32 scale for each output. Transformer Engine's own fp8 keeps
    weights as they are and transposed, one byte each: as much as bf16.
    """
    numbers, scales = _eight_bits(s)
    return s.width * parameters(s, index).all + s.stage_layers[index] * (scales - numbers)


def _eight_bits(s: RunSpec) -> tuple[float, float]:
    """Bytes of a layer's frozen weights in 8 bits, and of their scales."""
    numbers = scales = 0.0
    if not s.eight_bit_base:
        return numbers, scales
    for linear in s.known_shape.linears:
        share = s.trains(linear.name) * max(linear.experts, 1)
        split = 1 if linear.experts else s.tensor
        numbers += linear.inputs * linear.outputs / split * share
        divided = split if linear.name in ("linear_qkv", "linear_fc1") else 1
        scales += 4 * linear.outputs / divided * share
    return numbers, scales


def _weight_gradients(s: RunSpec, has_embedding: bool) -> float:
    """Bytes of gradients on their way to the fp32 sums.

    They are the largest matrix's, and the output layer's, which waits for the embedding's.

    Args:
        s: the run.
        has_embedding: whether the stage has both the embedding and the output layer.
    """
    if s.adapters is not None:
        return 0.0
    shape = s.known_shape
    largest = max(linear.inputs * linear.outputs for linear in shape.linears)
    size = s.width * largest / s.tensor
    if shape.tied and has_embedding:
        size += s.width * shape.vocab * shape.hidden / s.tensor
    return size
